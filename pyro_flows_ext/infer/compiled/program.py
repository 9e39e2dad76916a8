"""Compiled programs: one or more steps of loss, gradient and update in one call."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .lowering import SMALL_PRODUCTS, compile_graph, decompositions, options_for
from .tracing import LossGraph
from .unsupported import UnsupportedForCompilation
from .updates import Updates

Backend = str | Callable[[GraphModule, list[Tensor]], Callable[..., Any]]


class StepProgram:
    """`num_steps` steps on live parameters and optimizer states, which are written in place; or fewer, where it `loops`."""

    def __init__(
        self,
        traced: LossGraph,
        params: Mapping[str, Tensor],
        updates: Updates,
        arguments: Sequence[Tensor],
        with_beta: bool,
        num_steps: int,
        backend: Backend,
    ):
        self.updates, self.num_steps, self.with_beta = updates, num_steps, with_beta
        self.params = list(params.values())
        self.fixed = [*self.params, *updates.tensors, *traced.others]
        # Aliases that autograd does not follow.
        self.inputs = [t.detach() for t in self.fixed]
        written = [traced.others[i] for i in traced.written_others]
        unwritten = [t for i, t in enumerate(traced.others) if i not in traced.written_others]
        _check_memory([*self.params, *updates.tensors, *written], unwritten)
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.numbers = torch.zeros(num_steps, updates.width, dtype=torch.float64)
        self.rows = self.numbers.numpy()  # in the same memory
        self.size = torch.tensor(num_steps, device=self.device)  # of a call
        self.places = [(t.data_ptr(), t.shape, t.stride()) for t in self.fixed]
        self.steps_seen = -1  # the count of all steps, eager ones included, after its last call
        self.trainable = [p.requires_grad for p in self.params]
        counts = [len(self.params), len(updates.tensors), len(traced.others), len(arguments)]
        # Inductor compiles loops on the CPU, of steps that write into no tensor from outside of the loop.
        options = options_for(self.params) if backend == "inductor" else {}
        self.loops = "cpp_wrapper" in options and num_steps > 1 and not traced.writes
        example = [*self.inputs, *self._changing(arguments, [1.0] * num_steps)]
        steps = Steps(traced.graph, traced.reached, updates, counts, num_steps, self.loops)
        if backend == "eager":  # the graph of the loss is interpreted as it is
            self.run: Callable[..., Any] = steps
            return
        from torch.fx.experimental.proxy_tensor import make_fx

        table = (decompositions(options) if options else {}) | SMALL_PRODUCTS
        with torch.no_grad():
            to_graph = make_fx(steps, table, "fake", _allow_non_fake_inputs=True)
            self.run = _compile(to_graph(*example), example, backend)

    def takes(self, size: int) -> bool:
        """Whether a call can take `size` steps."""
        return size == self.num_steps or (self.loops and size < self.num_steps)

    def is_current(self, others_stepped: bool) -> bool:
        """Whether all tensors lie where the program reads and writes them, and the optimizers are as they were."""
        return (
            [(t.data_ptr(), t.shape, t.stride()) for t in self.fixed] == self.places
            and [p.requires_grad for p in self.params] == self.trainable
            and self.updates.is_current(others_stepped)
        )

    def __call__(self, arguments: Sequence[Tensor], loss: Any, size: int = 1) -> list[float]:
        """Takes `size` steps; returns their losses, NaN for steps that joint clipping leaves out."""
        betas = []
        if self.with_beta:
            for _ in range(size):
                betas.append(loss.beta)
                loss.advance()
        (result,) = self.run(*self.inputs, *self._changing(arguments, betas, size))
        losses: list[float] = result.tolist()[:size]
        taken = size
        if self.updates.joint_clip is not None:
            taken -= sum(map(math.isnan, losses))
        self.updates.taken(taken)
        return losses

    def _changing(
        self, arguments: Sequence[Tensor], betas: Sequence[float], size: int | None = None
    ) -> list[Tensor]:
        size = self.num_steps if size is None else size
        self.rows[:size] = self.updates.numbers(size)
        if self.loops:
            self.size.fill_(size)
        changing = [*arguments, self.numbers.to(self.device), self.size]
        if self.with_beta:
            rows = [*betas, *[math.nan] * (self.num_steps - size)]
            changing.append(torch.tensor(rows, dtype=self.dtype, device=self.device))
        return changing


def _check_memory(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Raises `UnsupportedForCompilation` where a written input shares memory with another: compilers assume none does."""
    counts = Counter(t.untyped_storage().data_ptr() for t in (*written, *read) if t.numel())
    if any(counts[t.untyped_storage().data_ptr()] > 1 for t in written):
        raise UnsupportedForCompilation(
            "a parameter, or a buffer that the program writes into, shares its memory with another tensor that it reads"
        )


def _compile(graph: GraphModule, example: list[Tensor], backend: Backend) -> Callable[..., Any]:
    """Compiles the graph without dynamo: nothing is left to capture, and its guards cost as much as a small step."""
    try:
        with _quiet():
            if backend == "inductor":
                return compile_graph(graph, example, options_for(example))
            if isinstance(backend, str):
                backend = torch._dynamo.lookup_backend(backend)
            return backend(graph, example)
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        raise UnsupportedForCompilation(
            f"the compiler failed with {type(error).__name__}: {message}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings and log messages of compilers."""
    log = logging.getLogger("torch._inductor")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# --- the function that is traced ---


class Steps:
    """(*params, *states, *others, *arguments, numbers, size, *betas) -> losses `(num_steps,)`, as a function to trace.

    `gradient`: (*params, *arguments, *beta, *others) -> (loss, *gradients), with gradients of the `reached` parameters.
    `counts`: the numbers of parameters, states, others and arguments. Parameters and states are written in place after
    the last step. A loop takes the first `size` steps. It carries one vector of all elements with the same update, in
    place of many small tensors.
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
        from torch._higher_order_ops.while_loop import while_loop_op

        def is_left(i: Tensor, losses: Tensor, *values: Tensor) -> Tensor:
            return i < values[len(moving)]  # `size`, the first of the fixed inputs

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
        """The loss before step i, and parameters and states after it."""
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
    """rows[i], where i is a Python number or a counter of the graph."""
    return rows[i] if isinstance(i, int) else rows.index_select(0, i.view(1)).squeeze(0)


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Consecutive parts of these sizes, followed by the rest."""
    rest, parts = list(tensors), []
    for count in counts:
        parts.append(rest[:count])
        rest = rest[count:]
    return [*parts, rest]
