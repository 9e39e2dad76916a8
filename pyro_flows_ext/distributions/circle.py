"""The uniform distribution of angles, the base of densities on circles and tori."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from ..ops import broadcast_shapes

CIRCLE = constraints.interval(-math.pi, math.pi)


class UniformAngles(TorchDistribution):
    """D independent angles, uniform on [-π, π): log p(x) = -D log 2π, for any real x, exact.

    Args:
        size: D.

    Example:
        >>> UniformAngles(2).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True
    support = constraints.independent(CIRCLE, 1)

    def __init__(self, size: int):
        # Its device and dtype are those of the draws.
        self.zero = torch.zeros(size)
        super().__init__(event_shape=self.zero.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> UniformAngles:
        new = self._get_checked_instance(UniformAngles, _instance)
        new.zero = self.zero
        super(UniformAngles, new).__init__(torch.Size(batch_shape), self.event_shape, False)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, D)`."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return (2 * torch.rand(shape, dtype=self.zero.dtype, device=self.zero.device) - 1) * math.pi

    def log_prob(self, value: Tensor) -> Tensor:
        """-D log 2π: `(*, D)` -> `(*)`."""
        shape = broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -len(self.zero) * math.log(2 * math.pi))
