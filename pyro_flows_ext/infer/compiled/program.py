"""A compiled program: some steps of loss, gradient and update in one call."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from .inductor import compile_graph, decompositions, options_for
from .products import SMALL_PRODUCTS
from .refusal import Refusal
from .steps import Steps
from .tracing import LossGraph
from .updates import Updates

Backend = str | Callable[[GraphModule, list[Tensor]], Callable[..., Any]]


class StepProgram:
    """`num_steps` steps, or fewer where it `loops`, on live parameters and optimizer states, which are written in place."""

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
        self.inputs = [
            t.detach() for t in self.fixed
        ]  # aliases, which no graph of autograd follows
        written = [traced.others[i] for i in traced.written_others]
        unwritten = [t for i, t in enumerate(traced.others) if i not in traced.written_others]
        _check_memory([*self.params, *updates.tensors, *written], unwritten)
        self.dtype, self.device = self.params[0].dtype, self.params[0].device
        self.numbers = torch.zeros(num_steps, updates.width, dtype=torch.float64)
        self.rows = self.numbers.numpy()  # in the same memory
        self.size = torch.tensor(num_steps, device=self.device)  # of a call
        self.places = [(t.data_ptr(), t.shape, t.stride()) for t in self.fixed]
        self.steps_seen = -1  # how many steps there had been, by whatever program, after its last
        self.trainable = [p.requires_grad for p in self.params]
        counts = [len(self.params), len(updates.tensors), len(traced.others), len(arguments)]
        # Inductor has loops on the CPU, of what writes into nothing that is there before.
        options = options_for(self.params) if backend == "inductor" else {}
        self.loops = "cpp_wrapper" in options and num_steps > 1 and not traced.writes
        example = [*self.inputs, *self._changing(arguments, [1.0] * num_steps)]
        if backend == "eager":  # the graph of the loss is interpreted as it is
            self.run: Callable[..., Any] = Steps(
                traced.graph, traced.reached, updates, counts, num_steps, self.loops
            )
            return
        steps = Steps(traced.merged, traced.reached, updates, counts, num_steps, self.loops)
        table = (decompositions(options) if options else {}) | SMALL_PRODUCTS
        with torch.no_grad():
            to_graph = make_fx(steps, table, "fake", _allow_non_fake_inputs=True)
            self.run = _compile(to_graph(*example), example, backend)

    def takes(self, size: int) -> bool:
        """Whether it can take so many steps."""
        return size == self.num_steps or (self.loops and size < self.num_steps)

    def is_current(self, others_stepped: bool) -> bool:
        """Whether all tensors lie where the program writes and reads, with optimizers that it suits."""
        return (
            [(t.data_ptr(), t.shape, t.stride()) for t in self.fixed] == self.places
            and [p.requires_grad for p in self.params] == self.trainable
            and self.updates.is_current(others_stepped)
        )

    def __call__(self, arguments: Sequence[Tensor], loss: Any, size: int = 1) -> list[float]:
        """Takes `size` steps; their losses, NaN for steps that joint clipping leaves out."""
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
    """Raises `Refusal` where what is written shares memory with another input: compilers get that wrong."""
    counts = Counter(t.untyped_storage().data_ptr() for t in (*written, *read) if t.numel())
    if any(counts[t.untyped_storage().data_ptr()] > 1 for t in written):
        raise Refusal(
            "a parameter, or a buffer that the program writes into, shares its memory with another tensor that it reads"
        )


def _compile(graph: GraphModule, example: list[Tensor], backend: Backend) -> Callable[..., Any]:
    """Hands the graph to a compiler, past dynamo: there is nothing left to capture, and its guards cost as much as a step."""
    try:
        with _quiet():
            if backend == "inductor":
                return compile_graph(graph, example, options_for(example))
            if isinstance(backend, str):
                backend = torch._dynamo.lookup_backend(backend)
            return backend(graph, example)
    except Exception as error:
        message = str(error).strip().split("\n")[0]
        raise Refusal(f"the compiler gave up: {type(error).__name__}: {message}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what compilers say about themselves, in warnings and in their log."""
    log = logging.getLogger("torch._inductor")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
