"""Radial flows (Rezende & Mohamed 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_positive
from .base import FlowTransform
from .bounds import slope_minus_one

# A bump narrower than this cannot be told from a point by data scaled to unit variance, and α > 0 keeps 1 / (α + r)
# finite at the centre.
MIN_ALPHA = 1e-3


class Radial(FlowTransform):
    """y = x + β (x - x₀) / (α + r) with r = ‖x - x₀‖, `num_layers` times in a row.

    log|det| = (D - 1) log(1 + β h) + log(1 + β α h²) with h = 1 / (α + r), exact. α > 0 and β > -α hold for any
    parameter value, so every layer is invertible. Starts near the identity (β ≈ 0).

    Parameters of K layers: `x0` `(K, D)`, `alpha_raw`, `beta_raw` `(K)`, with α = softplus(alpha_raw) and β / α an
    exponential linear unit of beta_raw, above -1. Cost: O(KD) in both directions: the inverse radius is the positive
    root of a quadratic.

    Args:
        input_dim: D, for events `(*, D)`.
        num_layers: K, the number of layers.
        context_dim: number of context variables that x₀, α and β depend on.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: if `input_dim` or `num_layers` is not positive, or in a pass if the last dimension is not D.

    Example:
        >>> flow = Radial(3, num_layers=2)
        >>> y, ladj = flow.forward_and_ladj(torch.zeros(5, 3))

    References:
        Rezende & Mohamed 2015, Variational Inference with Normalizing Flows, eq. 14 and app. A.2.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_layers: int = 1,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.num_layers = K = check_positive("num_layers", num_layers)
        self.x0 = nn.Parameter(torch.randn(K, D))
        # α near √D, the radius at which a standard normal lives.
        self.alpha_raw = nn.Parameter(D**0.5 + 0.1 * torch.randn(K))
        self.beta_raw = nn.Parameter(0.01 * torch.randn(K))
        self.add_hyper_network(context_dim, hidden_dims)

    def _layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        alpha = F.softplus(self.alpha_raw) + MIN_ALPHA
        beta = alpha * slope_minus_one(self.beta_raw)
        return self.x0.unbind(-2), alpha.unbind(-1), beta.unbind(-1)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        terms = []
        for x0, alpha, beta in zip(*self._layers(), strict=True):
            d = x - x0
            h = 1 / (alpha + _norm(d))
            x = x + (beta * h).unsqueeze(-1) * d
            terms.append(self._ladj(alpha, beta, h))
        return x, torch.stack(terms).sum(0)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
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
