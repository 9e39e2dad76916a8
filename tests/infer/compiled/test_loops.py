"""Several steps in a loop of the graph, and the graph's small products of matrices."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_flows_ext.infer import AnnealedELBO, linear
from pyro_flows_ext.infer.compiled import CompiledSVI, lowering, program
from pyro_flows_ext.infer.compiled.program import StepProgram

DATA = torch.tensor([0.3, -0.2, 0.8, 1.4])


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(z.sum() + w, 0.5), obs=DATA[rows])


def guide() -> None:
    loc = pyro.param("loc", torch.tensor([0.0, 0.1, 0.2]))
    matrix = pyro.param("matrix", 0.1 * torch.eye(3))
    width = pyro.param("width", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.param("unused", torch.ones(2))
    pyro.sample("z", dist.Normal(loc + matrix @ loc, width).to_event(1))
    pyro.sample("w", dist.Normal(loc[0], 1.0))


def params() -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store().items()}


def start() -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    return pyro.optim.Adam({"lr": 0.02})


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[StepProgram]:
    """Programs for Inductor, interpreted instead: those that were made."""
    made: list[StepProgram] = []
    init = StepProgram.__init__

    def noted(self: StepProgram, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(StepProgram, "__init__", noted)
    monkeypatch.setattr(program, "_compile", lambda graph, *_: graph)
    monkeypatch.setattr(program, "options_for", lambda _: {"cpp_wrapper": True})
    return made


@pytest.mark.slow
@pytest.mark.parametrize("annealed", [False, True], ids=["elbo", "annealed"])
def test_a_loop_takes_the_steps_of_the_handlers(
    interpreted: list[StepProgram], annealed: bool
) -> None:
    """12 steps: one eager, two calls of four, and one of the three that are left."""

    def loss() -> Any:
        return AnnealedELBO(Trace_ELBO(), linear(20)) if annealed else Trace_ELBO()

    svi = CompiledSVI(model, guide, start(), loss(), steps_per_call=4)
    losses, values, state = svi.run(12), params(), svi.optim.get_state()
    eager = SVI(model, guide, start(), loss())
    expected = torch.tensor([eager.step() for _ in range(12)], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, params(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, eager.optim.get_state(), rtol=1e-4, atol=1e-5)
    [made] = interpreted
    assert made.loops
    assert svi.fallback_reason is None


def test_a_graph_has_one_step_however_many_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def count(graph: torch.fx.GraphModule, *_: Any) -> torch.fx.GraphModule:
        parts = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        sizes.append(sum(len(part.graph.nodes) for part in parts))
        return graph

    monkeypatch.setattr(program, "_compile", count)
    monkeypatch.setattr(program, "options_for", lambda _: {"cpp_wrapper": True})
    for steps in (2, 50):
        CompiledSVI(model, guide, start(), Trace_ELBO(), steps_per_call=steps).run(1 + steps)
    assert sizes[0] == sizes[1]


def test_what_writes_into_buffers_is_repeated_instead(interpreted: list[StepProgram]) -> None:
    norm = nn.BatchNorm1d(1, affine=False)

    def batches() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, 0.5), obs=norm(DATA.unsqueeze(-1)).squeeze(-1))

    def normal() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    svi = CompiledSVI(batches, normal, start(), Trace_ELBO(), steps_per_call=3)
    svi.run(1 + 3 + 3)
    assert not interpreted[0].loops
    assert norm.num_batches_tracked == 7
    expected = (1 - 0.9**7) * DATA.mean()
    torch.testing.assert_close(norm.running_mean, expected.reshape(1))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_inductor_loops() -> None:
    svi = CompiledSVI(model, guide, start(), Trace_ELBO(), steps_per_call=8)
    losses, values = svi.run(21), params()
    eager = SVI(model, guide, start(), Trace_ELBO())
    expected = torch.tensor([eager.step() for _ in range(21)], dtype=torch.float64)
    assert svi.fallback_reason is None
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, params(), rtol=1e-5, atol=1e-5)


# --- small products ---


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        pytest.param(lowering.mm, [(1, 7), (7, 5)], id="row"),
        pytest.param(lowering.mm, [(4, 6), (6, 3)], id="matrices"),
        pytest.param(lowering.mm, [(40, 1), (1, 50)], id="outer"),
        pytest.param(lowering.mm, [(0, 3), (3, 2)], id="empty"),
        pytest.param(lowering.addmm, [(5,), (2, 7), (7, 5)], id="affine"),
        pytest.param(lowering.addmm, [(2, 1), (2, 1), (1, 5)], id="affine outer"),
        pytest.param(lowering.bmm, [(3, 2, 4), (3, 4, 5)], id="batch"),
        pytest.param(lowering.bmm, [(3, 20, 1), (3, 1, 50)], id="batch outer"),
    ],
)
def test_small_products(product: Callable[..., Any], shapes: list[tuple[int, ...]]) -> None:
    factors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = getattr(torch, product.__name__)(*factors)
    torch.testing.assert_close(product(*factors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "left",
    [
        lambda: lowering.mm(torch.ones(20, 20), torch.ones(20, 20)),
        lambda: lowering.bmm(torch.ones(9, 9, 9), torch.ones(9, 9, 9)),
        lambda: lowering.addmm(torch.ones(2), torch.ones(2, 2), torch.ones(2, 2), beta=2),
    ],
    ids=["mm", "bmm", "scaled"],
)
def test_other_products_are_left_to_the_library(left: Callable[[], Any]) -> None:
    assert left() is NotImplemented
