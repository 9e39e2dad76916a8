"""`CompiledSVI` as an object: steps, draws, arguments, and what may change between two calls."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.fx import GraphModule

from pyro_flows_ext.infer.compiled import CompiledSVI
from pyro_flows_ext.infer.compiled.steps import MAX_GRAPHS

DATA = torch.tensor([0.3, -0.2, 0.8, 1.4])


def model(x: torch.Tensor = DATA, scale: float = 0.5) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def guide(x: torch.Tensor = DATA, scale: float = 0.5) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    width = pyro.param("width", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, width))


class Graphs:
    """A backend that interprets graphs and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: GraphModule, example: Any) -> Any:
        self.count += 1
        return graph


def compiled(*parts: Any, lr: float = 0.02, loss: Any = None, **options: Any) -> CompiledSVI:
    parts = parts or (model, guide)
    return CompiledSVI(
        *parts, pyro.optim.SGD({"lr": lr}), loss or Trace_ELBO(), **{"backend": "eager"} | options
    )


def params() -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store().items()}


# --- steps and draws ---


@pytest.mark.parametrize("size", [1, 4])
def test_run_takes_the_steps_of_the_handlers(size: int) -> None:
    """11 steps: one eager, two calls of four, and two that are left."""
    svi = compiled(steps_per_call=size)
    pyro.set_rng_seed(3)
    losses, values = svi.run(11), params()
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    eager = SVI(model, guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
    expected = [eager.step() for _ in range(11)]
    torch.testing.assert_close(
        losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(values, params(), rtol=1e-5, atol=1e-6)
    assert svi.fallback_reason is None


def test_seeds_reproduce_a_run() -> None:
    svi = compiled(lr=0.0)
    svi.run(3)
    runs = []
    for seed in (5, 5, 6):
        pyro.set_rng_seed(seed)
        runs.append(svi.run(4))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_draws_are_fresh_and_have_the_right_moments() -> None:
    """With q = p, no data but y = 0 and no learning the loss is z²/2 + log(2π)/2: mean 1/2 more, variance 1/2."""

    def unit_guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.0, dtype=torch.float64))
        pyro.sample("z", dist.Normal(loc, 1.0))

    def square() -> None:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0, dtype=torch.float64))

    losses = compiled(square, unit_guide, lr=0.0, steps_per_call=5).run(2001)
    assert len(set(losses.tolist())) == len(losses)
    excess = losses - math.log(2 * math.pi) / 2
    n = len(losses)
    assert abs(excess.mean() - 0.5) < 4 * (0.5 / n) ** 0.5
    # The fourth central moment of z²/2 is 15/4, so the variance of its variance is (15/4 - 1/4) / n.
    assert abs(excess.var() - 0.5) < 4 * (3.5 / n) ** 0.5


def test_mini_batches_are_fresh() -> None:
    """Every mini-batch of 2 of 4 appears, and the loss with it."""

    def batches() -> None:
        z = pyro.sample("z", dist.Delta(torch.tensor(0.0)))
        with pyro.plate("data", 4, subsample_size=2) as rows:
            pyro.sample(
                "x", dist.Normal(z + pyro.param("loc", torch.tensor(0.0)), 1.0), obs=DATA[rows]
            )

    def nothing() -> None:
        pyro.sample("z", dist.Delta(torch.tensor(0.0)))
        with pyro.plate("data", 4, subsample_size=2):
            pass

    losses = compiled(batches, nothing, lr=0.0).run(80)
    squares = DATA.double() ** 2
    pairs = [
        math.log(2 * math.pi) * 2 + squares[i] + squares[j] for i in range(4) for j in range(i)
    ]
    seen = {min(range(6), key=lambda k, x=loss: abs(pairs[k] - x)) for loss in losses.tolist()}
    assert seen == set(range(6))


def test_evaluate_loss_is_that_of_the_handlers() -> None:
    svi = compiled()
    svi.run(3)
    pyro.set_rng_seed(1)
    value = svi.evaluate_loss()
    pyro.set_rng_seed(1)
    assert value == Trace_ELBO().loss(model, guide)


def test_a_loss_that_is_not_finite_is_reported() -> None:
    data = DATA.clone()

    def on_data() -> None:
        model(data)

    svi = compiled(on_data, lambda: guide(), lr=0.0)
    svi.run(3)
    data[0] = torch.nan
    with pytest.warns(UserWarning, match="Encountered NaN: loss"):
        loss = svi.step()
    assert math.isnan(loss)


# --- arguments ---


def test_values_keep_a_graph_and_shapes_make_one() -> None:
    graphs = Graphs()
    svi = compiled(backend=graphs, lr=0.0)
    for value in (1.0, 2.0, 3.0):
        svi.step(torch.full((3,), value))
    assert graphs.count == 1
    for _ in range(2):
        svi.step(torch.ones(5))
    assert graphs.count == 2
    for _ in range(2):
        svi.step(torch.ones(5), scale=0.7)
    assert graphs.count == 3
    pyro.set_rng_seed(0)
    loss = svi.step(torch.full((3,), 3.0))
    pyro.set_rng_seed(0)
    assert loss == pytest.approx(svi.evaluate_loss(torch.full((3,), 3.0)), rel=1e-5)
    assert graphs.count == 3


@pytest.mark.slow
def test_graphs_are_bounded() -> None:
    graphs = Graphs()
    svi = compiled(backend=graphs)
    for size in range(1, MAX_GRAPHS + 1):
        svi.step(torch.ones(size))
        svi.step(torch.ones(size))
    svi.step(torch.ones(20))
    with pytest.warns(UserWarning, match="graphs were made"):
        svi.step(torch.ones(20))
    svi.step(torch.ones(20))
    assert graphs.count == MAX_GRAPHS


def test_an_argument_without_a_hash_is_refused() -> None:
    class Options:
        __hash__ = None  # type: ignore[assignment]

    svi = compiled(lambda options: model(), lambda options: guide())
    with pytest.warns(UserWarning, match="an argument of type Options"):
        svi.step(Options())


# --- compilers ---


def test_a_compiler_that_fails_is_a_reason() -> None:
    def broken(graph: GraphModule, example: Any) -> Any:
        raise RuntimeError("no such machine\nand much more")

    svi = compiled(backend=broken)
    with pytest.warns(
        UserWarning, match=r"the compiler failed with RuntimeError: no such machine$"
    ):
        svi.run(3)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_inductor_takes_the_steps_of_the_handlers() -> None:
    results = []
    for make in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        losses = [svi.step() for _ in range(8)]
        results.append((losses, params()))
    assert svi.fallback_reason is None
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_train() -> None:
    data = DATA.cuda()

    def on_device() -> None:
        z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, 0.5), obs=data)

    svi = CompiledSVI(on_device, AutoNormal(on_device), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = svi.run(400)
    assert svi.fallback_reason is None
    assert losses[-100:].mean() < losses[:20].mean()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"steps_per_call": 0}, ValueError, "steps_per_call"),
        ({"steps_per_call": 1.5}, ValueError, "steps_per_call"),
        ({"loss": lambda *a: 0.0}, TypeError, "loss: expected a pyro.infer.ELBO"),
    ],
    ids=["zero", "fraction", "loss"],
)
def test_arguments_are_checked(options: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        compiled(**options)


def test_the_optimizer_is_pyros() -> None:
    with pytest.raises(ValueError, match="PyroOptim"):
        CompiledSVI(model, guide, torch.optim.Adam([nn.Parameter(torch.ones(1))]), Trace_ELBO())  # type: ignore[arg-type]
