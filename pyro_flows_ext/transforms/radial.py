"""Radial flows (Rezende & Mohamed 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._constrain import check_event, check_positive, slope_minus_one
from .base import FlowTransform
from .conditional import ConditionalFlow

# A bump narrower than this cannot be told from a point by data scaled to unit variance, and α > 0 keeps 1 / (α + r)
# finite at the centre.
MIN_ALPHA = 1e-3


class Radial(FlowTransform):
    """y = x + β (x - x₀) / (α + r) with r = ‖x - x₀‖, `num_layers` times in a row.

    log|det| = (D - 1) log(1 + β h) + log(1 + β α h²) with h = 1 / (α + r), exact. α > 0 and β > -α hold for any
    parameter value, so every layer is invertible. Starts near the identity (β ≈ 0).

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters for K layers: `x0` `(K, D)`, `alpha_raw`, `beta_raw`
    `(K)`, with α = softplus(alpha_raw) and β / α an exponential linear unit of beta_raw, above -1.
    Cost: O(KD) in both directions: the inverse radius is the positive root of a quadratic.
    Raises `ValueError` when the last dimension is not D.

    Source: Rezende & Mohamed 2015, Variational Inference with Normalizing Flows, eq. 14 and app. A.2.
    """

    def __init__(self, input_dim: int, *, num_layers: int = 1):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.num_layers = K = check_positive("num_layers", num_layers)
        self.x0 = nn.Parameter(torch.randn(K, D))
        # α near √D, the radius at which a standard normal lives.
        self.alpha_raw = nn.Parameter(D**0.5 + 0.1 * torch.randn(K))
        self.beta_raw = nn.Parameter(0.01 * torch.randn(K))

    def _layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        alpha = F.softplus(self.alpha_raw) + MIN_ALPHA
        beta = alpha * slope_minus_one(self.beta_raw)
        return self.x0.unbind(-2), alpha.unbind(-1), beta.unbind(-1)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        terms = []
        for x0, alpha, beta in zip(*self._layers(), strict=True):
            d = x - x0
            h = 1 / (alpha + _norm(d))
            x = x + (beta * h).unsqueeze(-1) * d
            terms.append(self._ladj(alpha, beta, h))
        return x, torch.stack(terms).sum(0)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
        terms = []
        for x0, alpha, beta in reversed(list(zip(*self._layers(), strict=True))):
            d = y - x0
            s = _norm(d)
            # s = r (1 + β / (α + r)) is r² + c r - α s = 0 with c = α + β - s. Of the two ways to write its positive
            # root, take for either sign of c the one without cancellation.
            c = alpha + beta - s
            root = _safe_sqrt(c * c + 4 * alpha * s)
            is_positive = c > 0
            r = torch.where(
                is_positive,
                2 * alpha * s / torch.where(is_positive, c + root, 1.0),
                (root - c) / 2,
            )
            h = 1 / (alpha + r)
            y = x0 + d / (1 + beta * h).unsqueeze(-1)
            terms.append(self._ladj(alpha, beta, h))
        return y, -torch.stack(terms).sum(0)

    def _ladj(self, alpha: Tensor, beta: Tensor, h: Tensor) -> Tensor:
        # Across the radius the map scales by 1 + βh, along it by 1 + βh + βh'r = 1 + βαh².
        tangential = torch.log1p(beta * h)
        return (self.input_dim - 1) * tangential + torch.log1p(beta * alpha * h * h)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, num_layers={self.num_layers}"


def _safe_sqrt(square: Tensor) -> Tensor:
    """√square with gradient 0, not NaN, at 0."""
    is_zero = square == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).sqrt())


def _norm(d: Tensor) -> Tensor:
    return _safe_sqrt((d * d).sum(-1))


class ConditionalRadial(ConditionalFlow):
    """Radial layers whose x₀, α and β depend on a context `(*, C)`; `.condition(context)` gives the transform."""

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        num_layers: int = 1,
    ):
        super().__init__(Radial(input_dim, num_layers=num_layers), context_dim, hidden_dims)


def radial(input_dim: int, *, num_layers: int = 1) -> Radial:
    """A radial flow of `num_layers` layers: see `Radial`."""
    return Radial(input_dim, num_layers=num_layers)


def conditional_radial(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    num_layers: int = 1,
) -> ConditionalRadial:
    """A radial flow amortized over a context: see `ConditionalRadial`."""
    return ConditionalRadial(input_dim, context_dim, hidden_dims, num_layers=num_layers)
