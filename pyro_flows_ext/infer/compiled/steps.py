"""Several steps in one program: one after the other, or in a loop, whose graph has one step however many it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop_op

from .updates import Updates


class Steps:
    """(*params, *states, *others, *arguments, numbers, size, betas?) -> losses `(num_steps,)`, as a function to trace.

    `gradient`: (*params, *arguments, *beta, *others) -> (loss, *gradients), the latter of parameters that are `reached`.
    `counts`: how many parameters, states, others and arguments there are. Parameters and states are written in place,
    after the last step. A loop takes the first `size` steps, and carries vectors, of all elements that are updated
    alike, rather than many small tensors.
    """

    def __init__(
        self,
        gradient: Callable[..., Any],
        reached: list[bool],
        updates: Updates,
        counts: Sequence[int],
        num_steps: int,
        in_a_loop: bool,
    ):
        self.gradient, self.reached, self.updates, self.counts = gradient, reached, updates, counts
        self.num_steps, self.in_a_loop = num_steps, in_a_loop
        self.blocks = updates.blocks(packed=in_a_loop)
        self.sizes = [1 + len(block.names) for block in self.blocks]

    def __call__(self, *flat: Tensor) -> tuple[Tensor]:
        params, states, others, arguments, (numbers, size, *betas) = _split(flat, self.counts)
        values = self.updates.by_param(list(compress(params, self.reached)), states)
        moving = [t for block in self.blocks for t in block.pack(values)]
        idle = compress(params, map(not_, self.reached))
        fixed = [size, numbers, *idle, *others, *arguments, *betas]
        losses, moving = (self._loop if self.in_a_loop else self._unroll)(moving, fixed)
        self.updates.write(self.blocks, _split(moving, self.sizes)[:-1], values)
        return (losses,)

    def _unroll(self, moving: list[Tensor], fixed: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        losses = []
        for i in range(self.num_steps):
            loss, moving = self._step(i, moving, fixed)
            losses.append(loss)
        return torch.stack(losses), moving

    def _loop(self, moving: list[Tensor], fixed: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        def is_left(i: Tensor, losses: Tensor, *values: Tensor) -> Tensor:
            return i < values[len(moving)]  # size, the first of what is fixed

        def body(i: Tensor, losses: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            loss, after = self._step(i, values[: len(moving)], values[len(moving) :])
            return (i + 1, losses.index_put((i,), loss), *after)

        first = torch.zeros((), dtype=torch.int64, device=moving[0].device)
        losses = moving[0].new_zeros(self.num_steps)
        _, losses, *after = while_loop_op(is_left, body, (first, losses, *moving), tuple(fixed))  # type: ignore[arg-type]
        return losses, after

    def _step(
        self, i: int | Tensor, moving: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss before step i, and what the step makes of parameters and states."""
        *values, _ = _split(moving, self.sizes)
        (_, numbers), idle, others, arguments, betas = _split(
            fixed, [2, self.reached.count(False), *self.counts[2:]]
        )
        reached = {
            k: p
            for block, (packed, *_) in zip(self.blocks, values, strict=True)
            for k, [p] in block.unpack([packed])
        }
        first, second = (reached[k] for k in sorted(reached)), iter(idle)
        params = [next(first if is_reached else second) for is_reached in self.reached]
        beta = [_row(b, i) for b in betas]
        loss, *grads = self.gradient(*params, *arguments, *beta, *others)
        loss, after = self.updates.apply(self.blocks, loss, grads, values, _row(numbers, i))
        return loss, [t for block in after for t in block]


def _row(rows: Tensor, i: int | Tensor) -> Tensor:
    """rows[i], for an i that the graph counts too."""
    return rows[i] if isinstance(i, int) else rows.index_select(0, i.view(1)).squeeze(0)


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """So many in turn, and a last part of what is left."""
    rest, parts = list(tensors), []
    for count in counts:
        parts.append(rest[:count])
        rest = rest[count:]
    return [*parts, rest]
