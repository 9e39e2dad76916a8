"""Graphs for Inductor: which of them need no more than Inductor itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flows_ext.infer.compiled import lowering, program

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


def results_last(x: Tensor, y: Tensor) -> tuple[Tensor]:
    new, loss = x * y + torch.randn(3), (x * y).sum()
    x.copy_(new)
    return (loss,)


def reads_what_it_wrote(x: Tensor, y: Tensor) -> tuple[Tensor]:
    x.copy_(x * y)
    return ((x * y).sum(),)


def writes_into_its_own(x: Tensor, y: Tensor) -> tuple[Tensor]:
    new = x * y
    new.add_(1)
    x.copy_(new)
    return (new.sum(),)


def inputs() -> list[Tensor]:
    return [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, -1.0, 2.0])]


@pytest.mark.parametrize(
    ("function", "expected"),
    [(results_last, True), (reads_what_it_wrote, False), (writes_into_its_own, False)],
)
def test_writes_last(function: Callable[..., tuple[Tensor]], expected: bool) -> None:
    graph = make_fx(function, tracing_mode="fake")(*inputs())
    assert lowering.writes_last(graph) is expected


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("function", [results_last, reads_what_it_wrote])
def test_a_compiled_graph_is_the_function(function: Callable[..., tuple[Tensor]]) -> None:
    """Values, what is written, draws, and the count of writes by which autograd notices them."""
    options = lowering.options_for(inputs())
    graph = make_fx(function, lowering.decompositions(options), tracing_mode="fake")(*inputs())
    compiled = program._compile(graph, inputs(), "inductor")
    x, y = inputs()
    x_compiled, y_compiled = inputs()
    for _ in range(2):
        torch.manual_seed(1)
        (expected,) = function(x, y)
        torch.manual_seed(1)
        before = x_compiled._version
        (value,) = compiled(x_compiled, y_compiled)
        torch.testing.assert_close((value, x_compiled), (expected, x))
        assert x_compiled._version > before
        assert torch.equal(y_compiled, y)
