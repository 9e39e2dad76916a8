"""`fit` with a fixed number of steps: closed forms, reproducibility, steps that go wrong."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from pyro_flows_ext.guides import AutoPlanar, AutoSylvester
from pyro_flows_ext.infer import fit

Y = torch.tensor([0.5, 1.5, -0.2, 0.9])


def conjugate(y=Y):
    """mu ~ N(0, 1), y ~ N(mu, 1): the posterior is N(Σy / (n+1), 1 / (n+1))."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def log_evidence(y=Y):
    covariance = torch.eye(len(y)) + torch.ones(len(y), len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()


def quick(guide, **options):
    options = {"num_steps": 20, "progress": False, "warm_start": False, "seed": 0, **options}
    return fit(conjugate, guide, Y, **options)


def test_reaches_the_exact_posterior_and_says_so():
    guide = AutoSylvester(conjugate)
    result = fit(
        conjugate, guide, Y, num_steps=300, lr=0.05, progress=False, warm_start=False, seed=0
    )
    assert result.elbo == pytest.approx(log_evidence(), abs=0.01)
    assert result.converged
    assert result.guide is guide
    assert (result.steps, result.skipped_steps, len(result.losses)) == (300, 0, 300)
    assert result.seconds > 0
    draws = guide.sample_posterior(20_000)["mu"]
    assert draws.mean().item() == pytest.approx(Y.sum().item() / 5, abs=0.02)
    assert draws.std().item() == pytest.approx(5**-0.5, abs=0.02)


def test_a_run_cut_short_is_not_converged():
    far = AutoPlanar(conjugate, init_scale=1e-4)  # of .45; some 60 steps away
    assert not quick(far, num_steps=40).converged


@pytest.mark.parametrize(
    "optim",
    [
        None,
        lambda params: torch.optim.SGD(params, lr=1e-3),
        pyro.optim.ClippedAdam({"lr": 0.01}),
    ],
    ids=["default", "torch", "pyro"],
)
@pytest.mark.parametrize("schedule", ["cosine", "exponential", "constant"])
def test_every_optimizer_and_schedule_lowers_the_loss(optim, schedule):
    result = quick(AutoPlanar(conjugate, 2), num_steps=100, optim=optim, schedule=schedule)
    assert result.losses[-30:].mean() < result.losses[:30].mean()


@pytest.mark.parametrize(
    "loss",
    [Trace_ELBO(), TraceMeanField_ELBO(), RenyiELBO(alpha=0.5, num_particles=2)],
    ids=["trace", "mean-field", "renyi"],
)
def test_any_loss(loss):
    assert quick(AutoPlanar(conjugate), loss=loss).losses.isfinite().all()


def test_stock_guides_train_too():
    result = quick(AutoNormal(conjugate), num_steps=200, lr=0.05)
    assert result.elbo == pytest.approx(log_evidence(), abs=0.02)


def test_the_seed_fixes_everything_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    losses = []
    for seed in (1, 1, 2):
        with pyro.get_param_store().scope():
            losses.append(quick(AutoPlanar(conjugate), seed=seed).losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert (losses[0] != losses[2]).all()
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


def test_a_second_call_goes_on_where_the_first_stopped():
    guide = AutoPlanar(conjugate)
    first = quick(guide, num_steps=100, lr=0.05)
    second = quick(guide, num_steps=20, lr=1e-4)
    assert second.losses.mean() < first.losses[:10].mean() - 1


def test_a_model_that_does_not_vectorise_falls_back_and_says_why():
    def reads_a_value(y=Y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = 1.0 if mu.item() < 1e6 else 2.0
        pyro.factor("likelihood", dist.Normal(mu, scale).log_prob(y).sum())

    guide = AutoPlanar(reads_a_value, 2)
    with pytest.warns(UserWarning, match="particles run one by one: handlers: RuntimeError"):
        result = fit(
            reads_a_value,
            guide,
            Y,
            num_steps=100,
            lr=0.1,
            num_particles=3,
            progress=False,
            warm_start=False,
            seed=0,
        )
    assert result.elbo == pytest.approx(log_evidence(), abs=0.05)


def test_model_kwargs_reach_model_and_guide():
    def regression(x, *, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    guide = AutoPlanar(regression)
    result = fit(regression, guide, Y, y=Y, num_steps=5, progress=False, warm_start=False)
    assert result.losses.isfinite().all()


class Flaky:
    """A conjugate model whose likelihood is not finite on chosen calls."""

    def __init__(self, bad):
        self.calls, self.bad = 0, bad

    def __call__(self, y):
        self.calls += 1
        conjugate(y)
        value = math.nan if self.bad(self.calls) else 0.0
        mu = pyro.sample("nu", dist.Normal(0.0, 1.0))
        pyro.factor("flaky", mu * value)


def test_steps_that_are_not_finite_are_skipped_and_counted():
    model = Flaky(lambda call: call % 5 == 0)
    guide = AutoPlanar(model)
    with pytest.warns(UserWarning, match="8 of 40 steps had no finite loss"):
        result = fit(
            model, guide, Y, num_steps=40, num_particles=1, progress=False, warm_start=False, seed=0
        )
    assert result.skipped_steps == result.losses.isnan().sum() == 8
    assert all(p.isfinite().all() for p in guide.parameters())
    assert math.isfinite(result.elbo)


def test_a_model_that_stops_being_finite_ends_in_one_clear_error():
    model = Flaky(lambda call: call > 3)
    guide = AutoPlanar(model)
    guide.setup(Y)
    with pytest.raises(FloatingPointError, match=r"100 steps in a row .* check the model"):
        fit(model, guide, Y, num_steps=500, num_particles=1, progress=False, warm_start=False)
    assert all(value.isfinite().all() for value in guide.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected a positive integer, got 0"),
        ({"num_particles": 1.5}, "num_particles: expected a positive integer"),
        ({"lr": math.nan}, "lr: expected a positive number"),
        ({"schedule": "linear"}, 'schedule: expected "cosine"'),
    ],
    ids=["steps", "particles", "lr", "schedule"],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        quick(AutoPlanar(conjugate), **options)


def test_the_progress_bar_shows_the_bound(capsys):
    quick(AutoPlanar(conjugate), num_steps=100, progress=True)
    assert "ELBO -" in capsys.readouterr().err


# --- schedulers ---


def test_a_scheduler_sets_the_rates():
    made, rates = [], []

    def scheduler(optimizer):
        made.append(StepLR(optimizer, step_size=25, gamma=0.5))
        return made[-1]

    quick(
        AutoPlanar(conjugate),
        num_steps=100,
        lr=0.04,
        scheduler=scheduler,
        callback=lambda state: rates.append(made[0].get_last_lr()[0]),
    )
    assert rates == pytest.approx([0.01, 0.0025])


def test_a_scheduler_that_goes_by_the_loss_gets_it_every_fifty_steps():
    made = []

    def scheduler(optimizer):
        made.append(ReduceLROnPlateau(optimizer, factor=0.5, patience=0))
        return made[-1]

    result = quick(AutoPlanar(conjugate), num_steps=150, scheduler=scheduler)
    assert made[0].last_epoch == 3
    means = [result.losses[i : i + 50].mean().item() for i in (0, 50, 100)]
    assert made[0].best == pytest.approx(min(means))


def test_a_scheduler_goes_on_from_a_checkpoint(tmp_path):
    def run(stop_at, **options):
        def callback(state):
            if state.step == stop_at:
                raise KeyboardInterrupt

        pyro.clear_param_store()
        return quick(
            AutoPlanar(conjugate),
            num_steps=150,
            scheduler=partial(OneCycleLR, max_lr=0.1, total_steps=151),
            checkpoint=tmp_path / "run.ckpt",
            callback=callback,
            **options,
        )

    expected = run(None).losses
    (tmp_path / "run.ckpt").unlink(missing_ok=True)
    assert run(50).reason == "interrupted"
    torch.testing.assert_close(run(None, resume=True).losses, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": None}, "scheduler: expected num_steps= beside it"),
        ({"optim": pyro.optim.Adam({"lr": 0.01})}, "got a PyroOptim"),
        ({"compile": True}, "scheduler: expected eager steps"),
    ],
    ids=["rounds", "PyroOptim", "compiled"],
)
def test_a_scheduler_that_would_not_count_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quick(AutoPlanar(conjugate), scheduler=partial(StepLR, step_size=5), **options)


def test_a_scheduler_in_place_of_a_function_is_refused():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(TypeError, match=r"scheduler: expected a function .*got a StepLR"):
        quick(AutoPlanar(conjugate), scheduler=StepLR(optimizer, 10))
