"""Graphs in simpler operations: small draws as one, with the numbers that they had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flows_ext.infer.compiled.lowering import MOST_ONE_BY_ONE, simplify

aten = torch.ops.aten


def simplified(function: Callable[..., list[Tensor]], *inputs: Tensor) -> GraphModule:
    graph = make_fx(function)(*inputs)
    simplify(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def draws_of(graph: GraphModule) -> list[list[int]]:
    nodes = graph.graph.find_nodes(op="call_function", target=aten.randn.default)
    return [list(node.args[0]) for node in nodes]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(), (), (8,)], [[10]]),
        ([(3,), (2, 3), ()], [[10]]),
        ([(8,), (7,), (1,)], [[15], [1]]),
        ([(8,), (8,), (3,)], [[8], [11]]),
        ([(4,), (20,), (4,), (2,)], [[4], [20], [6]]),
        ([(0,), (5,)], [[5]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_draws_are_one(
    shapes: list[tuple[int, ...]], expected: list[list[int]], dtype: torch.dtype
) -> None:
    def run() -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) for shape in shapes]

    graph = simplified(run)
    assert draws_of(graph) == expected
    for seed in range(3):  # and for another state within: the second of a pair is kept for later
        torch.manual_seed(seed)
        wanted = [*run(), *run()]
        torch.manual_seed(seed)
        assert all(map(torch.equal, [*graph(), *graph()], wanted))


def test_other_draws_keep_their_place() -> None:
    def run() -> list[Tensor]:
        a, b = torch.randn(2), torch.rand(2)
        c, d = torch.empty(3).normal_(), torch.randn(2, dtype=torch.float64)
        return [a, b, c, d, torch.randn(2, dtype=torch.float64)]

    graph = simplified(run)
    assert draws_of(graph) == [[2], [3], [4]]
    torch.manual_seed(1)
    wanted = run()
    torch.manual_seed(1)
    assert all(map(torch.equal, graph(), wanted))


def test_torch_draws_so_many_one_by_one() -> None:
    """What merging rests on; with one more, torch takes another algorithm."""
    for size, is_one_by_one in ((MOST_ONE_BY_ONE, True), (MOST_ONE_BY_ONE + 1, False)):
        torch.manual_seed(0)
        single = torch.stack([torch.randn(()) for _ in range(size)])
        torch.manual_seed(0)
        assert torch.equal(torch.randn(size), single) is is_one_by_one


def test_writes_into_what_others_see_stay() -> None:
    def run(x: Tensor) -> list[Tensor]:
        own, shared = x * 2, x * 3
        own.masked_fill_(x > 1, 0.0)
        view = shared.view(-1)
        shared.masked_fill_(x > 1, 0.0)
        return [own, view + 1]

    x = torch.tensor([0.5, 1.5])
    graph = simplified(run, x)
    assert len(graph.graph.find_nodes(op="call_function", target=aten.masked_fill_.Scalar)) >= 1
    assert all(map(torch.equal, graph(x), run(x)))
