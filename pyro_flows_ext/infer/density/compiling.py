"""The loss of a density by `torch.compile`: where it pays, and where it has the values and gradients of the eager loss."""

from __future__ import annotations

import math
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from ..compiled import UnsupportedForCompilation
from ..compiled.unsupported import failures_unsupported
from ..training.timing import AUTO_STEPS, Timing
from .checks import objective
from .rows import Batch

# Compiling takes up to two minutes, and saves a third of a step for many densities: it pays from eager steps of this total on.
LEAST_SECONDS = 300.0
# Largest differences from eager values and gradients, relative to the largest entry, in roundings of the dtype.
ROUNDINGS = 1e4

BACKEND = "inductor"


class CompiledObjective:
    """`objective` of a density on batches of one shape, compiled; eager on others.

    Args:
        density: in training mode.
        batch: one to compile for, and to compare with.
        parameters: those to train.

    Raises:
        UnsupportedForCompilation: if it cannot be compiled, draws random numbers, changes buffers, or differs from the eager
            objective in values or gradients; the density has not changed.
    """

    def __init__(self, density: Density, batch: Batch, parameters: Sequence[Tensor]):
        self.density = density
        self.shapes = _shapes(batch)
        _check_pure(density, batch)
        with failures_unsupported(), _quiet():
            self._run = _compile(density)
            values, *grads = self._graded(self._run, batch, parameters)
            others = self._run(*_reversed(batch)).detach()
        expected, *expected_grads = self._graded(self._eager, batch, parameters)
        expected_others = self._eager(*_reversed(batch)).detach()
        _check_equal("values", [values, others], [expected, expected_others])
        _check_equal("gradients", grads, expected_grads)

    def __call__(self, batch: Batch) -> Tensor:
        """The objective by row, `(B)`."""
        if _shapes(batch) != self.shapes:
            return self._eager(*batch)
        if self.density._validate_args:  # which a graph leaves out
            context = batch.context
            at: Any = self.density if context is None else self.density.condition(context)
            at._validate_sample(batch.values)
        with failures_unsupported(), _quiet():
            return self._run(*batch)

    def _eager(self, *batch: Tensor | None) -> Tensor:
        return objective(self.density, Batch(*batch))  # type: ignore[arg-type]

    def _graded(
        self, run: Callable[..., Tensor], batch: Batch, parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        values = run(*batch)
        grads = torch.autograd.grad(
            values.mean(), parameters, allow_unused=True, materialize_grads=True
        )
        return [values.detach(), *grads]


class Compiler:
    """Compiles the objective of a run after some steps if that pays, and returns to eager steps where it did not.

    Args:
        num_steps: steps of this run to come.
        when: True, after the first; "auto", where the eager steps left would take over five minutes, and only as long as
            compiled steps are faster; False, never.
    """

    def __init__(self, num_steps: int, when: bool | str):
        self.when = when
        self.timing = Timing(num_steps, when, LEAST_SECONDS)
        self.taken, self.last, self.fastest = 0, 0.0, math.inf

    def compile(
        self, steps: int, make: Callable[[], CompiledObjective]
    ) -> CompiledObjective | None:
        """The result of `make` if it is due after that many eager steps; None if not, and if it failed, with a warning if asked for."""
        if not self.timing.is_due(steps):
            return None
        try:
            return make()
        except UnsupportedForCompilation as unsupported:
            if self.when is True:
                warnings.warn(f"fit_density takes eager steps: {unsupported}", stacklevel=6)
            return None

    def is_slower(self) -> bool:
        """Whether, after some compiled steps, they are no faster than eager ones were: then "auto" gives them up."""
        now = time.perf_counter()
        self.taken += 1
        if self.taken > 1:
            self.fastest = min(self.fastest, now - self.last)
        self.last = now
        is_judged = self.when == "auto" and self.taken == AUTO_STEPS
        return is_judged and self.fastest >= self.timing.fastest


def _compile(density: Density) -> Callable[..., Tensor]:
    def run(values: Tensor, context: Tensor | None, weights: Tensor | None) -> Tensor:
        return objective(density, Batch(values, context, weights))

    # Graphs belong to a code object, of which each density gets its own: there is a limit of graphs for one.
    own = types.FunctionType(
        run.__code__.replace(co_name="density_objective"),
        run.__globals__,
        "run",
        None,
        run.__closure__,
    )
    compiled: Callable[..., Tensor] = torch.compile(
        own, fullgraph=True, dynamic=False, backend=BACKEND
    )
    return compiled


def _check_pure(density: Density, batch: Batch) -> None:
    """Raises `UnsupportedForCompilation` where the objective draws random numbers or changes buffers; undoes both."""
    devices = [batch.values.device] if batch.values.is_cuda else []
    buffers = {name: b.detach().clone() for name, b in density.named_buffers()}
    with torch.random.fork_rng(devices), torch.no_grad():
        before = _generators(devices)
        values = objective(density, batch)
        is_random = any(
            not torch.equal(a, b) for a, b in zip(before, _generators(devices), strict=True)
        )
        changed = [name for name, b in density.named_buffers() if not torch.equal(b, buffers[name])]
        for name, b in density.named_buffers():
            b.copy_(buffers[name])
    if is_random:
        raise UnsupportedForCompilation("the objective draws random numbers")
    if changed:
        raise UnsupportedForCompilation(f"the objective changes the buffer {changed[0]}")
    if not bool(values.isfinite().all()):
        raise UnsupportedForCompilation("the objective is not finite at the step that compiles")


def _generators(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def _check_equal(what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    largest = max(float(e.abs().max()) for e in expected)
    allowed = ROUNDINGS * torch.finfo(expected[0].dtype).eps * largest
    off = [float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)]
    # Not the maximum of `off`, which may pass over NaN.
    if not all(difference <= allowed for difference in off):
        raise UnsupportedForCompilation(
            f"{what} of the compiled objective differ from eager ones by up to {max(off):.3g}, of up to {largest:.3g}"
        )


def _shapes(batch: Batch) -> list[torch.Size | None]:
    return [None if part is None else part.shape for part in batch]


def _reversed(batch: Batch) -> Batch:
    """Other rows in every place."""
    return Batch(*(None if part is None else part.flip(0) for part in batch))  # type: ignore[arg-type]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
