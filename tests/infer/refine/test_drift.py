"""The tests of drift: how often they are wrong, and what they find."""

import pytest
import torch

from pyro_flows_ext.infer.refine import drift_from, drift_within

MAPS = {
    "normal": lambda x: x,
    "lognormal": lambda x: x.exp(),
    "very skewed": lambda x: (2 * x).exp(),
    "heavy tails": lambda x: x**3,
}


def simulate(
    a=0.3, shift=0.0, scale=1.0, chains=128, draws=16, size=20, warmup=6, f=MAPS["normal"]
):
    """Autoregressive chains that start from N(0, 1) and go to N(shift, scale²) in the first quantity: start, draws, population."""
    mean, sd = torch.zeros(size), torch.ones(size)
    mean[0], sd[0] = shift, scale
    start = x = torch.randn(chains, size)
    path = []
    for _ in range(warmup + draws):
        x = mean + a * (x - mean) + (1 - a * a) ** 0.5 * sd * torch.randn(chains, size)
        path.append(x)
    return f(start), f(torch.stack(path[warmup:], 1)), f(torch.randn(4096, size))


@pytest.mark.parametrize(
    "name",
    [
        "normal",
        pytest.param("lognormal", marks=pytest.mark.slow),  # between its neighbours
        "very skewed",
        "heavy tails",
    ],
)
def test_false_alarms_are_rare(name):
    """At most 1 % of runs are meant to raise one: of 60, more than 3 do so once in 300 times."""
    alarms, within = 0, 0
    for _ in range(60):
        start, draws, population = simulate(f=MAPS[name], chains=64, size=10)
        alarms += drift_from(start, draws, population).detected
        within += drift_within(draws).detected
    assert alarms <= 3
    assert within <= 3


@pytest.mark.parametrize(
    "change",
    [
        {"shift": 0.18},
        pytest.param({"shift": -0.18}, marks=pytest.mark.slow),
        {"scale": 1.15},
        {"scale": 0.85},
    ],
)
def test_shifts_that_matter_are_found(change):
    results = [drift_from(*simulate(a=0.1, draws=24, **change)) for _ in range(20)]
    assert sum(r.detected for r in results) >= 17
    assert all(r.worst == 0 for r in results if r.detected)
    estimate = torch.stack([r.mean[0] for r in results]).mean()
    assert abs(estimate - change.get("shift", 0.0)) < 0.03
    ratio = torch.stack([r.log_sd[0] for r in results]).mean().exp()
    assert abs(ratio - change.get("scale", 1.0)) < 0.03


def test_a_shift_of_chains_that_remember_is_estimated_to_its_end():
    """After 6 + 16 transitions of autocorrelation .9 the chains have gone some three quarters of the way."""
    results = [drift_from(*simulate(a=0.9, shift=1.0, size=3)) for _ in range(10)]
    assert all(r.detected for r in results)
    assert abs(torch.stack([r.mean[0] for r in results]).mean() - 1.0) < 0.15
    raw = torch.stack([r.memory[0] for r in results]).mean()
    assert 0.1 < raw < 0.5


def test_chains_that_do_not_move_prove_nothing():
    start = torch.randn(64, 3)
    result = drift_from(start, start.unsqueeze(1).expand(64, 8, 3), torch.randn(4096, 3))
    assert not result.detected
    assert not result.conclusive
    assert "hardly moved" in str(result)


def test_resolution_follows_the_number_of_draws():
    few, many = (drift_from(*simulate(draws=n, chains=c)) for n, c in ((2, 16), (40, 128)))
    assert many.conclusive
    assert not few.conclusive
    assert many.mean_resolution < 0.12 < few.mean_resolution
    assert "no drift (" in str(many)
    assert "too few draws" in str(few)


def test_drift_within_finds_a_run_that_has_not_settled():
    settled = [drift_within(simulate(a=0.5)[1]).detected for _ in range(10)]
    moving = [drift_within(simulate(a=0.9, shift=2.0, warmup=0)[1]) for _ in range(10)]
    assert not any(settled)
    assert all(r.detected for r in moving)
    assert all(r.mean[0] > 0.3 for r in moving)


def test_a_single_draw_has_no_halves():
    result = drift_within(simulate()[1][:, :1])
    assert not result.detected
    assert not result.conclusive


def test_the_words_name_the_quantity():
    names = [f"theta[{i}]" for i in range(20)]
    start, draws, population = simulate(shift=1.0)
    result = drift_from(start, draws, population, names=names)
    assert "drift in 1 of 20 quantities; theta[0]: mean +" in str(result)


def test_more_looks_raise_the_threshold():
    data = simulate()
    assert drift_from(*data, num_looks=5).threshold > drift_from(*data).threshold


def test_wrong_arguments():
    start, draws, population = simulate()
    with pytest.raises(ValueError, match="C >= 8"):
        drift_from(start[:5], draws[:5], population)
    with pytest.raises(ValueError, match="20 quantities throughout"):
        drift_from(start, draws, population[:, :4])
    with pytest.raises(ValueError, match="names: expected 20"):
        drift_from(start, draws, population, names=["a"])
    with pytest.raises(ValueError, match="8 chains or more"):
        drift_within(draws[:4])
