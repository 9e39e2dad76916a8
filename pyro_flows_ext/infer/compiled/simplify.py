"""The same graph in operations that loops and compilers take well."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from .repeats import is_draw

aten = torch.ops.aten

# Torch fills fewer elements one by one, and more by another algorithm.
MOST_ONE_BY_ONE = 15


def simplify(graph: GraphModule) -> None:
    """Says by functions what the run said by constants and by writing: loops have no place for either.

    Draws are the same ones, from the same generator, in fewer calls.
    """
    for node in graph.graph.nodes:
        with graph.graph.inserting_before(node):
            if node.target is aten.lift_fresh_copy.default and node.args[0].op == "get_attr":
                value = getattr(graph, node.args[0].target)
                options = {"dtype": value.dtype, "device": value.device}
                new = graph.graph.call_function(aten.full.default, ([], value.item()), options)
            elif _is_standard_draw(node):
                empty = node.args[0]
                new = graph.graph.call_function(aten.randn.default, empty.args[:1], empty.kwargs)
            elif node.target is aten.masked_fill_.Scalar and _is_private(node.args[0]):
                new = graph.graph.call_function(aten.masked_fill.Scalar, node.args)
                new.meta = node.meta
            else:
                continue
            node.replace_all_uses_with(new)
            graph.graph.erase_node(node)
    for draws in _small_draws(graph):
        _merge(graph, draws)


def _is_standard_draw(node: Node) -> bool:
    """Whether a node fills a tensor, made for this, with standard normal draws."""
    if node.target is not aten.normal_.default or len(node.args) > 1 or node.kwargs:
        return False
    empty = node.args[0]
    return (
        isinstance(empty, Node)
        and empty.target is aten.empty.memory_format
        and "memory_format" not in empty.kwargs
        and _is_private(empty)
    )


def _is_private(node: Node) -> bool:
    """Whether nothing but one operation sees the memory of what a node makes."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.users) > 1:
        return False
    return all(result.alias_info is None for result in node.target._schema.returns)


def _small_draws(graph: GraphModule) -> list[list[Node]]:
    """Draws of one type, with no others between them, that have few enough elements together."""
    groups: list[list[Node]] = [[]]
    for node in filter(is_draw, graph.graph.nodes):
        if not _is_small(node):
            groups.append([])
            continue
        group = [*groups[-1], node]
        is_one_type = len({draw.kwargs.get("dtype") for draw in group}) == 1
        if is_one_type and sum(map(_numel, group)) <= MOST_ONE_BY_ONE:
            groups[-1] = group
        else:
            groups.append([node])
    return [group for group in groups if len(group) > 1]


def _is_small(node: Node) -> bool:
    is_on_cpu = torch.device(node.kwargs.get("device") or "cpu").type == "cpu"  # type: ignore[arg-type]
    return node.target is aten.randn.default and is_on_cpu and _numel(node) <= MOST_ONE_BY_ONE


def _numel(draw: Node) -> int:
    return math.prod(draw.args[0])  # type: ignore[arg-type]


def _merge(graph: GraphModule, draws: Sequence[Node]) -> None:
    """One draw for several: the same numbers, which torch draws one after the other."""
    sizes = list(map(_numel, draws))
    with graph.graph.inserting_before(draws[0]):
        merged = graph.graph.call_function(aten.randn.default, ([sum(sizes)],), draws[0].kwargs)
        parts = graph.graph.call_function(aten.split_with_sizes.default, (merged, sizes))
        for i, draw in enumerate(draws):
            part = graph.graph.call_function(operator.getitem, (parts, i))
            shaped = graph.graph.call_function(aten.view.default, (part, draw.args[0]))
            draw.replace_all_uses_with(shaped)
    for draw in draws:
        graph.graph.erase_node(draw)
