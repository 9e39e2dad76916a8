"""`fit` with compiled steps: the numbers of its eager ones."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_flows_ext.guides import AutoRealNVP
from pyro_flows_ext.infer import ImportanceWeightedELBO, fit
from pyro_flows_ext.infer.compiled import CompiledTraining
from pyro_flows_ext.infer.training import timing, trainer

Y = torch.tensor([0.3, -0.2, 0.8, 1.4])


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(z.sum(-1), z.abs().sum(-1) + 0.5), obs=Y)


def reads_values() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.item(), 1.0), obs=Y[0])


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are interpreted, which takes no compiler and no time."""

    def interpreted(*args: Any, **options: Any) -> CompiledTraining:
        return CompiledTraining(*args, **options, backend="eager")

    monkeypatch.setattr(trainer, "CompiledTraining", interpreted)


def run(program: Any = model, make: Any = AutoNormal, **options: Any) -> tuple[Any, dict[str, Any]]:
    pyro.clear_param_store()
    settings: dict[str, Any] = {"num_steps": 20, "num_particles": 4, "seed": 0, "warm_start": False}
    result = fit(program, make(program), progress=False, **settings | options)
    return result, {k: v.detach().clone() for k, v in pyro.get_param_store().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "make": AutoRealNVP,
            "clip_norm": 0.5,
            "lr": 0.005,  # a cold start at .02 takes some flows to where float32 overflows
            "loss": ImportanceWeightedELBO(1, "stl", num_bounds=4, max_plate_nesting=1),
        },
        {"loss": Trace_ELBO(num_particles=2), "schedule": "exponential", "clip_norm": None},
        {"optim": pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9})},
        {"optim": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9)},
    ],
    ids=["defaults", "path-gradients", "loss", "pyro-optim", "factory"],
)
def test_compiled_steps_are_the_eager_ones(options: dict[str, Any]) -> None:
    eager, values = run(**options, compile=False)
    if "optim" in options and isinstance(options["optim"], pyro.optim.PyroOptim):
        options["optim"] = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9})
    ours, our_values = run(**options, compile=True)
    assert ours.compiled
    assert not eager.compiled
    torch.testing.assert_close(ours.losses, eager.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(our_values, values, rtol=1e-3, atol=1e-4)


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    """A large draw overflows: the losses that are NaN are so in the same places."""

    def overflows() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tail", torch.where(z > 0.1, torch.nan, -z * z))

    with pytest.warns(UserWarning, match="steps had no finite loss"):
        eager, values = run(overflows, num_particles=1, compile=False)
    with pytest.warns(UserWarning, match="steps had no finite loss"):
        ours, our_values = run(overflows, num_particles=1, compile=True)
    assert ours.compiled
    assert 0 < ours.skipped_steps < 20
    assert torch.equal(ours.losses.isnan(), eager.losses.isnan())
    torch.testing.assert_close(our_values, values, rtol=1e-4, atol=1e-5)


def test_auto_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not run()[0].compiled
    monkeypatch.setattr(timing, "AUTO_SECONDS", 0.0)
    assert run()[0].compiled


def test_what_does_not_compile_trains_eagerly() -> None:
    with pytest.warns(UserWarning, match=r"fit takes eager steps: a value is read .*z\.item\(\)"):
        result, _ = run(reads_values, num_particles=1, compile=True)
    assert not result.compiled
    assert result.losses.isfinite().all()


def test_compile_is_checked() -> None:
    with pytest.raises(ValueError, match="compile: expected"):
        run(compile="always")
