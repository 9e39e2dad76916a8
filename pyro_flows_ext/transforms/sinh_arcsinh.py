"""The sinh-arcsinh transform: skewness and tail weight, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._constrain import bounded, check_event, check_positive
from .base import FlowTransform
from .conditional import ConditionalFlow

# A normal tail exp(-x² / 2) becomes exp(-|x|^(2 δ) / 2): with δ down to 1/4 heavier than any exponential, and still finite in
# float32 up to |x| = 10⁹. Skewness shifts arcsinh(x): at 3 the two tails differ in scale by a factor of e^(6 / δ).
MAX_LOG_TAIL = math.log(4.0)
MAX_SKEWNESS = 3.0


class SinhArcsinh(FlowTransform):
    """y = sinh((arcsinh(x) + ε) / δ), element by element, with skewness ε and tail weight 1/δ `(D)`.

    log|det| = Σ log cosh(arcsinh y) - log cosh(arcsinh x) - log δ, exact. Of a standard normal x, δ < 1 makes the tails of y
    heavier, δ > 1 lighter, ε > 0 skews to the right. Flows from a normal base have normal tails wherever their
    layers become affine far out; behind one, this layer gives each coordinate its own: those of log-scales, which are
    exponential, and of much else. Starts at the identity. ε = 3 tanh(`skewness` / 3) and 1/δ = exp(log 4 tanh(`log_tail` /
    log 4)) stay bounded for any parameter value.

    Shapes x `(*, D)` -> y `(*, D)`, ladj `(*)`; O(D), closed form in both directions. Raises `ValueError` for another D.

    Source: Jones & Pewsey 2009, Sinh-arcsinh distributions.
    """

    def __init__(self, input_dim: int):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.skewness = nn.Parameter(torch.zeros(input_dim))
        self.log_tail = nn.Parameter(torch.zeros(input_dim))

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        skewness, log_tail = self._bounded()
        inner = x.asinh()
        outer = (inner + skewness) * log_tail.exp()
        return outer.sinh(), (_log_cosh(outer) - _log_cosh(inner) + log_tail).sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
        skewness, log_tail = self._bounded()
        outer = y.asinh()
        inner = outer * (-log_tail).exp() - skewness
        return inner.sinh(), (_log_cosh(inner) - _log_cosh(outer) - log_tail).sum(-1)

    def _bounded(self) -> tuple[Tensor, Tensor]:
        """ε and -log δ."""
        return bounded(self.skewness, MAX_SKEWNESS), bounded(self.log_tail, MAX_LOG_TAIL)

    def extra_repr(self) -> str:
        return f"{self.input_dim}"


def _log_cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x) - math.log(2.0)


class ConditionalSinhArcsinh(ConditionalFlow):
    """`SinhArcsinh` whose skewness and tails depend on a context `(*, C)`; `.condition(context)` gives the transform.

    The hyper-network's last layer emits 2D numbers a datum.
    """

    def __init__(self, input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None):
        super().__init__(SinhArcsinh(input_dim), context_dim, hidden_dims)


def sinh_arcsinh(input_dim: int) -> SinhArcsinh:
    """Skewness and tails by coordinate: see `SinhArcsinh`."""
    return SinhArcsinh(input_dim)


def conditional_sinh_arcsinh(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None
) -> ConditionalSinhArcsinh:
    """Skewness and tails by coordinate, amortized over a context: see `ConditionalSinhArcsinh`."""
    return ConditionalSinhArcsinh(input_dim, context_dim, hidden_dims)
