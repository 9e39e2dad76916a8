"""The density that a warm start searches, in float64, with its evaluations timed."""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor

# The least time of a gradient that is believed.
LEAST_SECONDS = 1e-6


class Target(Protocol):
    """A log density on ℝᴰ; `LogJoint` is one.

    `value_and_gradient` gives -inf and 0 where one is not finite. With `is_stochastic` each call draws its own part of the
    data.
    """

    @property
    def dim(self) -> int: ...

    @property
    def is_stochastic(self) -> bool: ...

    def __call__(self, u: Tensor) -> Tensor: ...

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]: ...

    def hessian(self, u: Tensor) -> Tensor: ...


class MeasuredTarget:
    """A target that takes and returns float64, whatever its own dtype, and whose cost can be asked for.

    A batch for which the target raises `ValueError`, as a model does that rejects most of its particles, has density zero; the
    last such error is kept in `error`, for the case that nothing else is found.
    """

    def __init__(self, target: Target, like: Tensor):
        self.target = target
        self.dim, self.is_stochastic = target.dim, target.is_stochastic
        self.dtype, self.device = like.dtype, like.device
        self.error: ValueError | None = None
        self._seconds: dict[int, float] = {}

    @torch.no_grad()
    def __call__(self, u: Tensor) -> Tensor:
        try:
            return self.target(u.to(self.dtype)).double()
        except ValueError as error:
            self.error = error
            return u.new_full(u.shape[:-1], -torch.inf)

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        try:
            value, gradient = self.target.value_and_gradient(u.to(self.dtype))
        except ValueError as error:
            self.error = error
            return u.new_full((len(u),), -torch.inf), torch.zeros_like(u)
        return value.double(), gradient.double()

    def hessian(self, u: Tensor) -> Tensor:
        return self.target.hessian(u.to(self.dtype)).double()

    def measure(self, loc: Tensor, num_rows: int) -> None:
        """Times a gradient of one row and of `num_rows` rows, all at `loc`."""
        self.value_and_gradient(
            loc.unsqueeze(0)
        )  # the first call of a model does work that later ones do not
        for rows in (1, num_rows):
            begin = self._clock()
            self.value_and_gradient(loc.expand(rows, -1).clone())
            # Clocks of processor time may stand still for milliseconds.
            self._seconds[rows] = max(self._clock() - begin, LEAST_SECONDS)

    def seconds(self, num_rows: int) -> float:
        """The time that a gradient of so many rows takes, from the two that were measured: a + b N."""
        (few, least), (many, most) = sorted(self._seconds.items())
        slope = max(0.0, (most - least) / max(1, many - few))
        return least + slope * (num_rows - few)

    def _clock(self) -> float:
        """Processor time, which other processes do not disturb; on an accelerator the time until it is done."""
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
