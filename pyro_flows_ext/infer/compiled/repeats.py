"""Stretches of a graph that repeat: equal layers and steps in time, and their gradients."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

# A stretch has to come so often, and to save so many nodes.
LEAST_COUNT, LEAST_SAVED = 3, 24
# So many runs are looked into, of every part of a graph.
MOST_RUNS = 8
# More of a stretch than that must not wait for the one before: stacking parameters would cost more than it saves.
MOST_WAITING = 1 / 4
# Larger tensors take longer to stack than the calls that this saves.
MOST_ELEMENTS = 4096


@dataclass(frozen=True)
class Inside:
    """What the same stretch computes at an offset."""

    offset: int


@dataclass(frozen=True)
class Carried:
    """What the stretch before computes at an offset; for the first stretch, another node."""

    offset: int
    first: Node


@dataclass(frozen=True)
class Given:
    """What there is before the first stretch: a node for each, which may be the same."""

    nodes: tuple[Node, ...]


Source = Inside | Carried | Given


@dataclass(frozen=True)
class Repeat:
    """`rows[k][j]`: the node at offset j of stretch k. `sources[j]`: where the inputs of the nodes at offset j come from."""

    rows: list[list[Node]]
    sources: list[list[Source]]

    @cached_property
    def waits(self) -> list[bool]:
        """Of every offset, whether it depends on the stretch before."""
        waits: list[bool] = []
        for row in self.sources:
            is_late = (
                isinstance(s, Carried) or (isinstance(s, Inside) and waits[s.offset]) for s in row
            )
            waits.append(any(is_late))
        return waits

    @cached_property
    def chain(self) -> list[int]:
        """Offsets that wait for the stretch before and that the next one waits for."""
        needed = {s.offset for row in self.sources for s in row if isinstance(s, Carried)}
        for j in reversed(range(len(self.sources))):
            if j in needed:
                needed |= {s.offset for s in self.sources[j] if isinstance(s, Inside)}
        for j, (node, row) in enumerate(zip(self.rows[0], self.sources, strict=True)):
            if node.target is operator.getitem and {s.offset for s in row} <= needed:  # type: ignore[union-attr]
                needed.add(j)  # all parts of a tuple, or none
        return [j for j in sorted(needed) if self.waits[j]]

    @property
    def saved(self) -> int:
        """How many nodes fewer there are with all but the chain computed at once."""
        return (len(self.rows) - 1) * (len(self.sources) - len(self.chain))

    @property
    def is_worthwhile(self) -> bool:
        waiting = len(self.chain) / len(self.sources)
        seen = {n for node in self.rows[0] for n in (node, *inputs_of(node))}
        values = [value for n in seen if isinstance(value := n.meta.get("val"), Tensor)]
        is_small = all(value.numel() <= MOST_ELEMENTS for value in values)
        return 0 < waiting <= MOST_WAITING and self.saved >= LEAST_SAVED and is_small


def find_repeats(graph: GraphModule) -> list[Repeat]:
    """Repeats of a graph that are worthwhile, in its order."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    return list(_Search(nodes).within(0, len(nodes)))


def inputs_of(node: Node) -> list[Node]:
    """The nodes among the arguments, in their order, as often as they occur."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def is_draw(node: Node) -> bool:
    """Whether a node takes numbers from a generator."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class _Search:
    def __init__(self, nodes: list[Node]):
        self.nodes = nodes
        self.place = {node: i for i, node in enumerate(nodes)}
        numbers: dict[Hashable, int] = {}
        self.kinds = torch.tensor([numbers.setdefault(_kind(n), len(numbers)) for n in nodes])

    def within(self, start: int, stop: int) -> Iterator[Repeat]:
        """Of nodes start to stop: the repeat of the longest run that has one, and those before and after it."""
        for run in self._runs(start, stop):
            repeats = [repeat for repeat in self._repeats(*run) if repeat.is_worthwhile]
            if repeats:
                best = max(repeats, key=lambda repeat: repeat.saved)
                first, last = self.place[best.rows[0][0]], self.place[best.rows[-1][-1]]
                yield from self.within(start, first)
                yield best
                yield from self.within(last + 1, stop)
                return

    def _runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(first, stop, period) of nodes whose kinds come again a period later, by what they may save."""
        kinds, runs = self.kinds[start:stop], []
        for period in range(2, (stop - start) // LEAST_COUNT + 1):
            is_equal = torch.zeros(len(kinds) - period + 2, dtype=torch.int8)
            is_equal[1:-1] = kinds[:-period] == kinds[period:]
            ends = is_equal.diff().nonzero().flatten().tolist()
            for first, last in zip(ends[::2], ends[1::2], strict=True):
                most = (last - first) // period * period
                if most >= max((LEAST_COUNT - 1) * period, LEAST_SAVED):
                    runs.append((most, start + first, start + last + period, period))
        runs.sort(key=lambda run: -run[0])
        return [run[1:] for run in runs[:MOST_RUNS]]

    def _repeats(self, first: int, stop: int, period: int) -> Iterator[Repeat]:
        """Those of a run, by where their stretches begin, with all stretches of the run or all but one."""
        for begin in range(first, min(first + period, stop)):
            most = (stop - begin) // period
            counts = (count for count in (most, most - 1) if count >= LEAST_COUNT)
            repeats = (self._repeat(begin, period, count) for count in counts)
            repeat = next(filter(None, repeats), None)
            if repeat is not None:
                yield repeat

    def _repeat(self, begin: int, period: int, count: int) -> Repeat | None:
        """The repeat, unless stretches differ in where inputs come from."""
        starts = range(begin, begin + count * period, period)
        rows = [self.nodes[start : start + period] for start in starts]
        sources: list[list[Source]] = []
        for nodes in zip(*rows, strict=True):
            slots = list(zip(*map(inputs_of, nodes), strict=True))
            row = [source for slot in slots if (source := self._source(slot, starts)) is not None]
            if len(row) < len(slots) or not _is_repeatable(nodes[0], row):
                return None
            sources.append(row)
        return Repeat(rows, sources)

    def _source(self, slot: tuple[Node, ...], starts: range) -> Source | None:
        """Where the nodes of an input are, one for every stretch."""
        places = [self.place.get(node, -1) for node in slot]
        if max(places) < starts[0]:
            return Given(slot)
        first, *offsets = (place - start for place, start in zip(places, starts, strict=True))
        if len(set(offsets)) > 1:
            return None
        if first == offsets[0] >= 0:
            return Inside(first)
        if first < 0 and -starts.step <= offsets[0] < 0:
            return Carried(offsets[0] + starts.step, slot[0])
        return None


def _kind(node: Node) -> Hashable:
    """What equal nodes of different stretches share: all but which nodes they read."""
    arguments = map_arg((node.args, node.kwargs), lambda n: _shape(n.meta.get("val")))
    return str(node.target), repr(arguments), repr(_shape(node.meta.get("val")))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    return [_shape(v) for v in value] if isinstance(value, (list, tuple)) else None


def _is_repeatable(node: Node, sources: Sequence[Source]) -> bool:
    """Whether a node writes nothing, and draws from nothing that a stretch computes."""
    if node.target is operator.getitem:
        return isinstance(sources[0], Inside)  # of a tuple, which must not leave its stretch
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    return not is_draw(node) or all(isinstance(source, Given) for source in sources)
