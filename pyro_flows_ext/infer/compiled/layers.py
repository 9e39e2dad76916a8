"""A graph whose equal layers are computed at once, as far as they do not wait for one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .repeats import Carried, Given, Inside, Repeat, Source, find_repeats, inputs_of, is_draw


def merge_layers(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The function of a graph, with equal layers computed at once where there are any.

    The graph itself where torch has no batched form of what layers do, as a run with these inputs tells.
    """
    layers = Layers(graph)
    if not layers.repeats:
        return graph
    try:
        with torch.no_grad():
            layers(*inputs)
    except (RuntimeError, NotImplementedError):
        return graph
    return layers


class Layers:
    """The function of a graph, by fewer operations: what layers compute of parameters alone, and what no later layer
    depends on, gradients of parameters above all, has the layers as its first dimension. Left are the chains.
    """

    def __init__(self, graph: GraphModule):
        self.graph, self.repeats = graph, find_repeats(graph)
        starts = {repeat.rows[0][0]: repeat for repeat in self.repeats}
        inside = {node for repeat in self.repeats for row in repeat.rows for node in row}
        self.items: list[Node | Repeat] = []
        for node in graph.graph.nodes:
            if node in starts:
                self.items.append(starts[node])
            elif node not in inside:
                self.items.append(node)

    def __call__(self, *inputs: Tensor) -> Any:
        given, values = iter(inputs), _Values()
        for item in self.items:
            if isinstance(item, Repeat):
                _Stretches(item, values).compute()
            elif item.op == "placeholder":
                values.single[item] = next(given)
            elif item.op == "get_attr":
                values.single[item] = getattr(self.graph, str(item.target))
            elif item.op == "call_function":
                values.single[item] = _apply(item, map(values.get, inputs_of(item)))
        [output] = self.graph.graph.find_nodes(op="output")
        return map_arg(output.args[0], values.get)


class _Values:
    """What nodes are: by themselves, or rows of a tensor."""

    def __init__(self) -> None:
        self.single: dict[Node, Any] = {}
        self.rows: dict[Node, tuple[Tensor, int]] = {}

    def get(self, node: Node) -> Any:
        if node not in self.single:
            stacked, k = self.rows[node]
            self.single[node] = stacked[k]
        return self.single[node]

    def set_rows(self, nodes: Iterable[Node], stacked: Tensor) -> None:
        self.rows.update((node, (stacked, k)) for k, node in enumerate(nodes))

    def stack(self, nodes: Sequence[Node]) -> Tensor:
        """Nodes as rows of a tensor: of one that has them, in this order or from the last to the first, or of a new one."""
        found = [self.rows.get(node, (None, 0)) for node in nodes]
        stacked, places = found[0][0], [k for _, k in found]
        if stacked is not None and all(other is stacked for other, _ in found):
            steps = {b - a for a, b in pairwise(places)}
            if steps == {1}:
                return stacked[places[0] : places[-1] + 1]
            if steps == {-1}:
                return stacked[places[-1] : places[0] + 1].flip(0)
        return torch.stack([self.get(node) for node in nodes])


class _Stretches:
    """Computes a repeat: what waits for no stretch, the chain, what no stretch waits for."""

    def __init__(self, repeat: Repeat, values: _Values):
        self.repeat, self.values, self.size = repeat, values, len(repeat.rows)
        self.offset_of = {node: j for row in repeat.rows for j, node in enumerate(row)}

    def compute(self) -> None:
        waits, chain = self.repeat.waits, set(self.repeat.chain)
        drawn = self._draw()
        self._at_once([j for j, is_late in enumerate(waits) if not is_late and j not in drawn])
        self._one_by_one(self.repeat.chain)
        self._at_once([j for j, is_late in enumerate(waits) if is_late and j not in chain])

    def _draw(self) -> set[int]:
        """Draws in the order of the graph; their offsets."""
        draws = [j for j, node in enumerate(self.repeat.rows[0]) if is_draw(node)]
        for row in self.repeat.rows:
            for node in (row[j] for j in draws):
                self.values.single[node] = _apply(node, map(self.values.get, inputs_of(node)))
        return set(draws)

    def _at_once(self, offsets: Sequence[int]) -> None:
        """Some offsets of all stretches."""
        among, columns = set(offsets), self._columns(offsets)
        shared = {s: self.values.get(nodes[0]) for s, nodes in columns.items() if _is_one(nodes)}
        stacks = {s: self.values.stack(n) for s, n in columns.items() if s not in shared}
        exported = [
            j
            for j in offsets
            if any(
                self.offset_of.get(user) not in among
                for row in self.repeat.rows
                for user in row[j].users
            )
        ]

        def of_one(*rows: Tensor) -> list[Tensor]:
            computed = self._compute(offsets, shared | dict(zip(stacks, rows, strict=True)))
            return [computed[j] for j in exported]

        if stacks:
            results = torch.vmap(of_one)(*stacks.values())
        else:
            results = [value.expand(self.size, *value.shape) for value in of_one()]
        for j, stacked in zip(exported, results, strict=True):
            self.values.set_rows(self._column(Inside(j)), stacked)

    def _one_by_one(self, chain: Sequence[int]) -> None:
        """Some offsets, from stretch to stretch."""
        columns = self._columns(chain)
        for k, row in enumerate(self.repeat.rows):
            known = {s: self.values.get(column[k]) for s, column in columns.items()}
            for j, value in self._compute(chain, known).items():
                self.values.single[row[j]] = value

    def _compute(self, offsets: Sequence[int], known: Mapping[Source, Any]) -> dict[int, Any]:
        """The values at some offsets of one stretch, where those of other sources are `known`."""
        values: dict[Source, Any] = dict(known)
        for j in offsets:
            inputs = [values[s] for s in self.repeat.sources[j]]
            values[Inside(j)] = _apply(self.repeat.rows[0][j], inputs)
        return {j: values[Inside(j)] for j in offsets}

    def _columns(self, offsets: Sequence[int]) -> dict[Source, Sequence[Node]]:
        """What some offsets take from elsewhere than each other, and where that is."""
        taken = dict.fromkeys(s for j in offsets for s in self.repeat.sources[j])
        inside = {Inside(j) for j in offsets}
        return {s: self._column(s) for s in taken if s not in inside}

    def _column(self, source: Source) -> Sequence[Node]:
        """The node of every stretch."""
        if isinstance(source, Given):
            return source.nodes
        column = [row[source.offset] for row in self.repeat.rows]
        return [source.first, *column[:-1]] if isinstance(source, Carried) else column


def _is_one(nodes: Sequence[Node]) -> bool:
    return all(node is nodes[0] for node in nodes)


def _apply(node: Node, inputs: Iterable[Any]) -> Any:
    """The operation of a node, on other inputs."""
    rest = iter(inputs)
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: next(rest))
    return node.target(*args, **kwargs)  # type: ignore[operator]
