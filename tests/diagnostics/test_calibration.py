"""Simulation-based calibration: uniform ranks for exact posteriors, and the shapes of ranks for those that are not."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats
from torch import nn

from pyro_flows_ext.diagnostics.calibration import CalibrationResult, simulation_based_calibration
from pyro_flows_ext.diagnostics.plots_calibration import rank_histogram
from pyro_flows_ext.guides import AutoAmortizedFlow

X = torch.zeros(50, 2)
SD = torch.tensor([1.0, 0.5])
PRECISION = 1 + SD**-2


def local(x, other=None):
    """z_n ~ N(0, I), x_n ~ N(z_n, diag SD²): posteriors of precisions 2 and 5."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, SD).to_event(1), obs=x)


def guide_of(width=1.0, shift=0.0):
    """The posterior, with the sd of its second coordinate times `width` and the mean of the first moved by `shift` sds."""
    widths, shifts = torch.tensor([1.0, width]), torch.tensor([shift, 0.0])

    def guide(x, other=None):
        sd = PRECISION**-0.5
        with pyro.plate("data", len(x)):
            loc = x / SD**2 / PRECISION + shifts * sd
            pyro.sample("z", dist.Normal(loc, widths * sd).to_event(1))

    return guide


def test_exact_posterior():
    result = simulation_based_calibration(local, guide_of(), X, num_simulations=30)
    assert set(result.ranks) == {"z[0]", "z[1]"}
    for name, ranks in result.ranks.items():
        assert len(ranks) == 30 * 50  # every datum counts
        assert ranks.min() >= 0
        assert ranks.max() <= 99
        assert result.p_values[name] > 0.01
        assert max(map(abs, result.shape(name))) < 3.5
    assert "No sign of miscalibration" in str(result)


@pytest.mark.parametrize(
    ("options", "parameter", "words"),
    [
        ({"width": 0.7}, "z[1]", "too close together"),
        ({"width": 1.5}, "z[1]", "too far apart"),
        ({"shift": 0.4}, "z[0]", "too high"),
        ({"shift": -0.4}, "z[0]", "too low"),
    ],
    ids=["narrow", "wide", "high", "low"],
)
def test_what_is_wrong_is_said(options, parameter, words):
    result = simulation_based_calibration(local, guide_of(**options), X, num_simulations=20)
    other = {"z[0]": "z[1]", "z[1]": "z[0]"}[parameter]
    assert result.p_values[parameter] < 1e-4
    assert result.p_values[other] > 0.01
    assert result.p_value == pytest.approx(2 * result.p_values[parameter])
    assert f"draws of {parameter} are {words}" in result.verdict


def test_ranks_of_a_narrow_guide_have_the_known_distribution():
    """Draws of sd w σ: with u ~ N(0, 1) the error of the mean, the rank is Binomial(L, Φ(u / w))."""
    w, L = 0.5, 9
    result = simulation_based_calibration(
        local, guide_of(width=w), X, num_simulations=80, num_draws=L
    )
    u = dist.Normal(0.0, 1.0).sample((200_000,))
    p = torch.special.ndtr(u / w)
    shares = stats.binom.pmf(np.arange(10)[:, None], L, p.numpy()).mean(1)
    counts = np.bincount(result.ranks["z[1]"], minlength=10)
    assert stats.chisquare(counts, 4000 * shares / shares.sum()).pvalue > 1e-3


def test_p_value_is_pearsons():
    rng = np.random.default_rng(0)
    result = CalibrationResult({"z": rng.integers(0, 100, 500)}, 99)
    counts, expected = result.counts("z")
    assert len(counts) == 20
    assert counts.sum() == 500
    assert result.p_value == pytest.approx(stats.chisquare(counts, expected).pvalue)


@pytest.mark.parametrize(
    ("num_ranks", "num_draws", "sizes"),
    [
        (1000, 99, [5] * 20),
        (1000, 31, [2] * 16),  # even bins, of which there are fewer
        (1000, 9, [1] * 10),
        (60, 99, [10] * 10),  # five ranks a bin at least
        (1000, 100, [5] * 10 + [6] + [5] * 9),  # a prime number of ranks
    ],
    ids=["many", "even", "few-draws", "few-ranks", "prime"],
)
def test_bins(num_ranks, num_draws, sizes):
    result = CalibrationResult({"z": np.arange(num_ranks) % (num_draws + 1)}, num_draws)
    assert np.diff(result.edges).tolist() == sizes
    assert result.counts("z")[1].sum() == pytest.approx(num_ranks)


def test_p_values_and_scores_are_those_of_uniform_ranks():
    rng = np.random.default_rng(0)
    results = [CalibrationResult({"z": rng.integers(0, 20, 200)}, 19) for _ in range(1000)]
    p_values = [r.p_value for r in results]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    scores = np.array([r.shape("z") for r in results])
    np.testing.assert_allclose(scores.mean(0), 0.0, atol=4 / 1000**0.5)
    np.testing.assert_allclose(scores.std(0), 1.0, atol=4 / 2000**0.5)


# --- global latents, samplers, arguments ---


def shared(y, size=4):
    """mu ~ N(0, 1), th_ij ~ N(mu, 1), y_n ~ N(mu, 1): mu | y ~ N(Σ y / 5, 1 / 5)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("th", dist.Normal(mu, torch.ones(2, 2)).to_event(2))
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def exact_sampler(num, y, size=4):
    mu = y.sum() / 5 + torch.randn(num) * 5**-0.5
    return {"mu": mu, "th": mu[:, None, None] + torch.randn(num, 2, 2)}


def chain_sampler(num, y, size=4):
    """A Markov chain of the right stationary distribution, correlation .9 a step."""
    noise, value = torch.randn(num + 1), []
    state = noise[-1]
    for step in noise[:-1]:
        state = 0.9 * state + (1 - 0.81) ** 0.5 * step
        value.append(state)
    return {"mu": y.sum() / 5 + torch.stack(value) * 5**-0.5}


def test_global_latents_have_a_rank_a_simulation():
    result = simulation_based_calibration(
        shared, None, torch.zeros(4), sampler=exact_sampler, num_simulations=200
    )
    assert list(result.ranks) == ["mu", "th[0,0]", "th[0,1]", "th[1,0]", "th[1,1]"]
    assert {len(ranks) for ranks in result.ranks.values()} == {200}
    assert result.p_value > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("thin", "is_even"), [(1, False), (30, True)], ids=["all", "thinned"])
def test_correlated_draws_have_to_be_thinned(thin, is_even):
    result = simulation_based_calibration(
        shared,
        None,
        torch.zeros(4),
        sampler=chain_sampler,
        num_simulations=200,
        num_draws=19,
        thin=thin,
    )
    assert (result.p_value > 0.01) == is_even


def test_ties_are_broken_at_random():
    """k ~ Bernoulli(.3), known up to a flip of probability .2: of 9 draws most equal the truth."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * k), obs=x)

    def guide(x):
        yes, no = 0.3 * (0.8 * x + 0.2 * (1 - x)), 0.7 * (0.2 * x + 0.8 * (1 - x))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(yes / (yes + no)))

    result = simulation_based_calibration(
        model, guide, torch.zeros(100), num_simulations=20, num_draws=9
    )
    assert result.p_value > 0.01


def test_an_amortized_flow_and_keywords():
    """Data by keyword; the guide's auxiliary latent has no rank."""
    guide = AutoAmortizedFlow(local, nn.Linear(2, 3), flow="planar", num_layers=1)
    guide.setup(x=X)
    result = simulation_based_calibration(local, guide, x=X, num_simulations=3, num_draws=19)
    assert set(result.ranks) == {"z[0]", "z[1]"}
    assert result.shape("z[0]")[1] > 5  # untrained, it starts at a tenth of the prior's width


def test_inner_plates_and_plates_left_of_the_data():
    def model(x):
        with pyro.plate("data", 30, dim=-1), pyro.plate("group", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def model_with_scale(x):
        with pyro.plate("data", 30, dim=-1):
            pyro.sample("s", dist.Normal(0.0, 1.0))
            with pyro.plate("group", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def sampler(num, x):
        return {"z": x / 2 + 0.5**0.5 * torch.randn(num, 2, 30, 3), "s": torch.randn(num, 30)}

    x, options = torch.zeros(2, 30, 3), {"num_simulations": 5, "num_draws": 19}
    result = simulation_based_calibration(model, None, x, sampler=sampler, **options)
    assert {k: len(v) for k, v in result.ranks.items()} == {f"z[{i}]": 300 for i in range(3)}
    assert result.p_value > 0.01
    result = simulation_based_calibration(model_with_scale, None, x, sampler=sampler, **options)
    assert set(result.ranks) == {"s", *(f"z[{i},{j}]" for i in range(2) for j in range(3))}
    assert {len(v) for v in result.ranks.values()} == {150}
    assert result.p_value > 0.01


def test_data_that_are_no_argument():
    model = pyro.condition(lambda: shared(None), data={"y": torch.zeros(4)})
    with pytest.raises(ValueError, match="to_args"):
        simulation_based_calibration(model, None, sampler=exact_sampler)
    result = simulation_based_calibration(
        model, None, sampler=exact_sampler, to_args=lambda values: (values["y"],)
    )
    assert result.p_value > 0.01


def test_a_guide_that_runs_one_draw_at_a_time():
    """The model's th has no room for a batch of draws of mu."""

    def guide(y, size=4):
        mu = pyro.sample("mu", dist.Normal(y.sum() / 5, 5**-0.5))
        pyro.sample("th", dist.Normal(mu, torch.ones(2, 2)).to_event(2))

    result = simulation_based_calibration(
        shared, guide, torch.zeros(4), num_simulations=100, num_draws=9
    )
    assert result.p_value > 0.01


def with_factor(x):
    local(x)
    pyro.factor("f", torch.tensor(0.0))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (with_factor, {}, "factor 'f'"),
        (lambda x: None, {}, "observed site"),
        (local, {"num_simulations": 0}, "num_simulations"),
        (local, {"thin": 0.5}, "thin"),
        (local, {"sampler": exact_sampler}, "beside a sampler"),
        (local, {"guide": None}, "or None and a sampler"),
        (lambda x: local(x[:1]), {"num_simulations": 3}, "to_args"),
    ],
    ids=["factor", "no-data", "simulations", "thin", "both", "neither", "part"],
)
def test_refusals(model, options, message):
    guide = options.pop("guide", guide_of())
    with pytest.raises(ValueError, match=message):
        simulation_based_calibration(model, guide, X, **options)


def test_too_few_ranks():
    with pytest.raises(ValueError, match="at least 10 ranks"):
        simulation_based_calibration(
            shared, None, torch.zeros(4), sampler=exact_sampler, num_simulations=9
        )


# --- the picture ---


def result_of(names, seed=0, num_ranks=2000):
    rng = np.random.default_rng(seed)
    return CalibrationResult({name: rng.integers(0, 100, num_ranks) for name in names}, 99)


def test_rank_histogram():
    result = result_of(["a", "b", "c", "d"])
    axes = rank_histogram(result)
    figure = axes.flat[0].figure
    FigureCanvasAgg(figure).draw()
    assert axes.shape == (2, 3)
    assert [ax.axison for ax in axes.flat] == [True] * 4 + [False] * 2
    for ax, name in zip(axes.flat, result.ranks, strict=False):
        assert ax.get_title() == f"{name}   p = {result.p_values[name]:.2g}"
        heights = [bar.get_height() for bar in ax.patches if hasattr(bar, "get_height")]
        assert heights == result.counts(name)[0].tolist()
    # The band: 99 % of Binomial(2000, 1 / 20).
    (band,) = axes[0, 0].collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == tuple(stats.binom.ppf([0.005, 0.995], 2000, 0.05))
    assert axes[1, 0].get_xlabel() == "rank of 99"


def test_only_the_worst_panels():
    result = result_of([f"z[{i}]" for i in range(5)])
    result.ranks["z[3]"][:] = 0
    axes = rank_histogram(result, max_panels=2)
    titles = [ax.get_title().split()[0] for ax in axes.flat]
    assert len(titles) == 2
    assert "z[3]" in titles
    assert "2 of 5 parameters" in axes.flat[0].figure.get_suptitle()
    axes = rank_histogram(result, names=["z[1]"])
    assert [ax.get_title().split()[0] for ax in axes.flat] == ["z[1]"]
    with pytest.raises(ValueError, match="names"):
        rank_histogram(result, names=["y"])


def test_long_tables_are_cut():
    text = str(result_of([f"z[{i}]" for i in range(20)]))
    assert "and 8 of higher p-values" in text
    assert math.isfinite(result_of(["z"]).shape("z")[0])
