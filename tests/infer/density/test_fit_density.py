"""`fit_density`: numbers against closed forms, the best parameters kept, reproducibility, and what it refuses."""

import math
from functools import partial
from itertools import chain

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import (
    ContinuouslyIndexedFlow,
    Density,
    Dequantized,
    FlowDistribution,
    NestedDropoutFlow,
)
from pyro_flows_ext.flows import Planar, RealNVP
from pyro_flows_ext.infer import fit_density

TRUTH = dist.MultivariateNormal(
    torch.tensor([1.0, -2.0]), scale_tril=torch.tensor([[1.5, 0.0], [0.8, 0.4]])
)


def normal(dim=2):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def affine(dim=2):
    return FlowDistribution(normal(dim), T.LULinear(dim))


def rows(num, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TRUTH.sample((num,))


def quick(density, data, **options):
    options = {"num_steps": 30, "batch_size": 50, "lr": 0.01, "seed": 0, "progress": False, "validation": None, **options}  # fmt: skip
    return fit_density(density, data, **options)


def by_maximum_likelihood(data):
    """The mean log-density of the data under the Gaussian with their moments."""
    return dist.MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0)).log_prob(data)


def test_a_linear_flow_reaches_the_likelihood_of_the_moments():
    data, density = rows(400), affine()
    result = quick(density, data, num_steps=300, batch_size=400, lr=0.05)
    best = by_maximum_likelihood(data).mean().item()
    assert density.log_prob(data).mean().item() == pytest.approx(best, abs=1e-3)
    assert (result.steps, result.best_step, result.skipped_steps) == (300, 300, 0)
    assert -result.losses[-1].item() == pytest.approx(best, abs=1e-3)
    assert math.isnan(result.best_loss)
    assert len(result.validation_losses) == 0
    assert not result.stopped_early
    assert result.density is density
    assert result.seconds > 0


DENSITIES = {
    "flow": lambda: FlowDistribution(normal(), T.nsf(2, num_layers=2, hidden_dims=(8,))),
    "indexed": lambda: ContinuouslyIndexedFlow(
        normal(), T.maf(2, num_layers=2, hidden_dims=(8,)), 1, (5,), (8,)
    ),
    "nested": lambda: NestedDropoutFlow(normal(), T.QRLinear(2)),
}


@pytest.mark.parametrize("name", list(DENSITIES))
def test_densities_train_and_keep_what_was_best(name):
    density = DENSITIES[name]()
    data, validation = rows(500), rows(200, seed=1)
    result = quick(density, data, validation=validation, num_steps=100, lr=0.03, patience=None)
    assert result.validation_steps.tolist() == list(range(0, 101, 2))
    losses = result.validation_losses
    assert losses.min() < losses[0] - 0.5
    assert result.best_loss == losses.min()
    assert result.best_step == result.validation_steps[losses.argmin()]
    # That they are the density's now: another run that begins here finds the same at its first look.
    again = quick(density, data, validation=validation, num_steps=1)
    assert again.validation_losses[0].item() == result.best_loss


def test_the_penalty_of_nested_dropout_is_in_the_loss():
    density, data = NestedDropoutFlow(normal(), T.LULinear(2)), rows(4000)
    result = quick(density, data, validation=data, num_steps=1, batch_size=4000, lr=1e-9)
    torch.manual_seed(0)
    plain = -density.log_prob(data).mean().item()
    # Of the identity, k = 1 drops the second number, and k >= 2 nothing.
    expected = plain + 20 * 0.33 * data[:, 1].square().mean().item()
    assert result.losses[0].item() == pytest.approx(expected, rel=0.2)
    assert result.validation_losses[0].item() == pytest.approx(expected, rel=0.2)
    assert result.losses[0].item() > plain + 5


# These densities have a fixed scale, so that one value for all rows is no harm.
constant = pytest.mark.filterwarnings("ignore:.*of constant.*has no bound there")


class Shift(Density):
    """N(loc, 1), from 0 on; a buffer counts its training passes."""

    def __init__(self):
        super().__init__(event_shape=torch.Size([1]))
        self.loc = nn.Parameter(torch.zeros(1))
        self.register_buffer("passes", torch.tensor(0))

    def log_prob(self, value):
        if self.training:
            self.passes += 1
        return dist.Normal(self.loc, 1.0).to_event(1).log_prob(value)


@constant
@pytest.mark.parametrize("patience", [3, None])
def test_early_stopping_restores_the_best(patience):
    density = Shift()
    result = quick(
        density,
        torch.full((8, 1), 5.0),
        validation=torch.full((2, 1), 1.0),
        num_steps=100,
        lr=0.1,
        schedule="constant",
        evaluate_every=5,
        patience=patience,
    )
    # Adam moves by .1 a step: to 1 in ten, and on to 5.
    assert result.best_step == 10
    assert density.loc.item() == pytest.approx(1.0, abs=0.02)
    assert density.passes == 10  # buffers too
    assert not density.training
    assert result.best_loss == pytest.approx(0.5 * math.log(2 * math.pi), abs=1e-3)
    assert result.stopped_early == (patience == 3)
    assert result.steps == (25 if patience == 3 else 100)
    assert result.validation_steps[-1] == result.steps


@constant
@pytest.mark.parametrize("num_steps", [100, 200])
def test_the_default_patience_is_a_fifth_of_the_run(num_steps):
    validation = torch.zeros(2, 1)  # the start is best
    result = quick(Shift(), torch.full((8, 1), 5.0), validation=validation, num_steps=num_steps)
    assert result.stopped_early
    assert (result.best_step, result.steps) == (0, num_steps // 5)


def test_the_seed_fixes_everything_and_leaves_the_generator_alone():
    data, runs = rows(100), []
    start = {k: v.clone() for k, v in DENSITIES["indexed"]().state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    densities = [DENSITIES["indexed"]() for _ in range(3)]
    torch.manual_seed(3)
    for density, seed in zip(densities, (1, 1, 2), strict=True):
        density.load_state_dict(start)
        runs.append(quick(density, data, validation=data, seed=seed))
    torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert torch.equal(runs[0].validation_losses, runs[1].validation_losses)
    assert (runs[0].losses != runs[2].losses).all()
    # All looks take the same random numbers, whatever the seed of the run.
    assert runs[0].validation_losses[0] == runs[2].validation_losses[0]


def test_looks_do_not_disturb_the_run():
    data = rows(100)
    losses = []
    for evaluate_every in (1, 30):
        torch.manual_seed(0)
        density = DENSITIES["indexed"]()
        run = quick(density, data, validation=data, evaluate_every=evaluate_every, patience=None)
        losses.append(run.losses)
    assert torch.equal(*losses)


def test_every_row_comes_once_in_an_order():
    class Recorder(Shift):
        def log_prob(self, value):
            if self.training:
                seen.append(value.flatten().tolist())
            return super().log_prob(value)

    seen = []
    quick(Recorder(), torch.arange(10.0)[:, None] + 0.25, batch_size=3, num_steps=6)
    assert [len(batch) for batch in seen] == [3] * 6
    orders = [list(chain(*seen[:3])), list(chain(*seen[3:]))]
    assert all(len(set(order)) == 9 for order in orders)
    assert orders[0] != orders[1]
    seen.clear()
    quick(Recorder(), torch.arange(10.0)[:, None] + 0.25, batch_size=99, num_steps=2)
    assert [sorted(batch) for batch in seen] == [[i + 0.25 for i in range(10)]] * 2


@pytest.mark.parametrize("schedule", ["cosine", "exponential", "constant"])
def test_schedules_and_optimizers(schedule):
    rates = []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    result = quick(
        affine(), rows(100), schedule=schedule, optim=lambda p: Recorded(p, lr=0.02), num_steps=50
    )
    assert rates[0] == 0.02
    share = {"cosine": 0.01 + 0.99 * (1 + math.cos(0.98 * math.pi)) / 2, "exponential": 0.01**0.98}
    assert rates[-1] == pytest.approx(0.02 * share.get(schedule, 1.0))
    assert result.losses[-10:].mean() < result.losses[:10].mean()


def test_whole_numbers_and_other_dtypes_come_to_the_density():
    inner = FlowDistribution(normal(3), T.LULinear(3))
    data = torch.randint(0, 4, (100, 3))
    result = quick(Dequantized(inner, num_levels=4), data, validation=data)
    assert result.losses.isfinite().all()
    double = affine().double()
    assert quick(double, rows(100)).losses.isfinite().all()
    assert next(double.parameters()).dtype == torch.float64


class Faulty(Shift):
    """Without a finite loss at some steps, or without a finite gradient."""

    def __init__(self, bad, kind):
        super().__init__()
        self.bad, self.kind = bad, kind

    def log_prob(self, value):
        log_p = super().log_prob(value)
        if self.training and int(self.passes) in self.bad:
            return log_p * math.nan if self.kind == "loss" else log_p + (self.loc - self.loc).sqrt()
        return log_p


@constant
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_steps_that_are_not_finite_change_nothing_and_are_counted(kind):
    density = Faulty({2, 3}, kind)
    with pytest.warns(UserWarning, match="2 of 30 steps had no finite loss"):
        result = quick(density, torch.ones(8, 1))
    assert result.losses.isnan().nonzero().flatten().tolist() == [1, 2]
    assert result.skipped_steps == 2
    assert density.loc.isfinite().all()


@constant
def test_a_run_that_never_works_ends():
    with pytest.raises(FloatingPointError, match="100 steps in a row"):
        quick(Faulty(set(range(1000)), "loss"), torch.ones(8, 1), num_steps=200)


@constant
def test_validation_rows_without_a_density_are_a_failure():
    class Half(Shift):
        def log_prob(self, value):
            return super().log_prob(value).where(value[..., 0] > 0, -math.inf)

    with pytest.raises(FloatingPointError, match="no finite validation loss in 10 evaluations"):
        quick(Half(), torch.ones(8, 1), validation=-torch.ones(2, 1), num_steps=100)


REFUSED = {
    "steps": ({"num_steps": 0}, "num_steps: expected a positive integer, got 0"),
    "batch": ({"batch_size": 2.5}, "batch_size: expected a positive integer, got 2.5"),
    "every": ({"evaluate_every": 0}, "evaluate_every: expected a positive integer"),
    "patience": ({"patience": 0}, "patience: expected a positive integer"),
    "rate": ({"lr": -1.0}, "lr: expected a positive number"),
    "schedule": ({"schedule": "steep"}, "schedule: expected"),
    "first steps": ({"first_steps": 30}, "first_steps: expected an integer from 0 to 29, got 30"),
    "none first": ({"first_steps": 3}, "expected 0 for a density without a part to train later"),
    "no rows": ({"data": torch.zeros(0, 2)}, r"data: expected at least one row, got shape \(0, 2\)"),
    "event": ({"data": torch.zeros(9, 3)}, r"data: expected rows \(N, 2\), got \(N, 3\)"),
    "grid": ({"data": torch.zeros(9, 4, 2)}, r"data: expected rows \(N, 2\)"),
    "nan": ({"data": torch.tensor([[0.0, math.nan]])}, "data: 1 of 2 values is NaN, the first in row 0"),
    "validation": ({"validation": torch.tensor([[math.inf, 1.0]])}, "validation: 1 of 2 values is infinite"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_input(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        quick(affine(), options.get("data", rows(20)), **{k: v for k, v in options.items() if k != "data"})  # fmt: skip


def test_what_is_no_density():
    with pytest.raises(TypeError, match="density: expected a Density"):
        quick(TRUTH, rows(20))
    fixed = affine()
    fixed.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters to train"):
        quick(fixed, rows(20))
    conditional = FlowDistribution(normal(), T.nsf(2, num_layers=1, context_dim=1))
    with pytest.raises(ValueError, match=r"data: expected a context \(1, 1\) beside the rows"):
        quick(conditional, rows(20))


def test_progress_goes_to_stderr(capsys):
    quick(affine(), rows(100), validation=rows(20), num_steps=50, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "validation" in err
    assert "step 50" in err


# --- learning rates and what is not finite ---


def test_a_scheduler_sets_the_rates():
    rates = []

    def scheduler(optimizer):
        made.append(torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5))
        return made[-1]

    made = []

    def callback(state):
        rates.append(made[0].get_last_lr()[0])

    quick(affine(), rows(100), num_steps=40, lr=0.1, scheduler=scheduler, evaluate_every=10, callback=callback)  # fmt: skip
    assert rates == pytest.approx([0.05, 0.025, 0.0125, 0.00625])


def test_a_scheduler_that_goes_by_the_validation_loss():
    made = []

    def scheduler(optimizer):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        made.append((plateau, optimizer))
        return plateau

    quick(affine(), rows(200), validation=rows(50), num_steps=60, lr=0.5, scheduler=scheduler, evaluate_every=5, patience=None)  # fmt: skip
    plateau, optimizer = made[0]
    assert plateau.last_epoch == 12  # the evaluation before any step is before the optimizer too
    assert optimizer.param_groups[0]["lr"] < 0.5


def test_a_scheduler_goes_on_from_a_checkpoint(tmp_path):
    def run(num, **options):
        torch.manual_seed(0)
        density = affine()

        def callback(state):
            state.stop = state.step == num

        return quick(density, rows(100), num_steps=40, lr=0.1, evaluate_every=10, seed=0, checkpoint=tmp_path / "c.pt",
                     scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=41), callback=callback, **options)  # fmt: skip

    expected = run(None)
    (tmp_path / "c.pt").unlink()
    assert run(20).steps == 20
    found = run(None, resume=True)
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=0)


def test_a_scheduler_that_is_made_too_early_is_named():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(
        TypeError, match=r"scheduler: expected a function that makes one, .*got a StepLR"
    ):
        quick(affine(), rows(100), scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 10))


def test_a_run_that_breaks_keeps_the_best_parameters():
    density = RealNVP(2, num_layers=2)
    broken = []

    def callback(state):
        if state.step >= 50 and not broken:
            broken.append(state.best_step)
            with torch.no_grad():
                next(density.parameters()).fill_(math.nan)

    with (
        pytest.warns(UserWarning, match=r"100 steps in a row .* has the parameters of step \d+"),
        pytest.warns(UserWarning, match="100 of 150 steps"),
    ):
        result = quick(density, rows(200), validation=rows(50), num_steps=400, lr=0.05, evaluate_every=10, patience=None, callback=callback)  # fmt: skip
    assert 0 < result.best_step <= 50
    assert (result.steps, result.stopped_early) == (150, True)
    assert all(p.isfinite().all() for p in density.parameters())


def test_a_result_is_printed_in_one_line():
    options = {"num_steps": 4, "batch_size": 50, "seed": 0, "progress": False}
    x = torch.randn(200, 2)
    result = fit_density(Planar(2), x, validation=0.1, **options)
    line = f"validation loss {result.best_loss:.4g} nats a row at step {result.best_step} of 4"
    assert str(result).startswith(line)
    assert "tensor" not in repr(result)
    without = fit_density(Planar(2), x, validation=None, **options)
    assert "no validation data" in str(without)
