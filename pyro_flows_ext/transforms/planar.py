"""Planar flows (Rezende & Mohamed 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import matvec, tanh_root
from ._constrain import check_event, check_positive, slope_minus_one
from .base import FlowTransform
from .conditional import ConditionalFlow


class Planar(FlowTransform):
    """y = x + û tanh(wᵀx + b), `num_transforms` times in a row.

    log|det| = log(1 + wᵀû (1 - tanh²(wᵀx + b))), exact; û is u corrected along w so that wᵀû > -1 for any parameter
    value (`w = 0` included), which makes every layer invertible. Starts near the identity (û ≈ 0).

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters for K layers: `w`, `u` `(K, D)`, `b` `(K)`. The
    constrained û of all layers come from one batched operation.
    Cost: O(KD) forward; the inverse adds one scalar root a layer (Newton, at most 14 steps, gradients by the implicit
    function theorem).
    Raises `ValueError` when the last dimension is not D.

    Source: Rezende & Mohamed 2015, Variational Inference with Normalizing Flows, eqs. 10 to 12 and app. A.1 (whose
    m(wᵀu) is shifted here to vanish at 0, so that u = 0 is the identity).
    """

    def __init__(self, input_dim: int, *, num_transforms: int = 1):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.num_transforms = K = check_positive("num_transforms", num_transforms)
        self.w = nn.Parameter(torch.randn(K, D) / D**0.5)
        self.u = nn.Parameter(0.01 * torch.randn(K, D))
        self.b = nn.Parameter(0.1 * torch.randn(K))

    def _layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """w, û and b layer by layer, and the k = wᵀû of all layers `(*, K)`."""
        w, u = self.w, self.u
        wu = (w * u).sum(-1)
        w_square = (w * w).sum(-1)
        is_zero = w_square == 0  # then wᵀû = 0 whatever û is, and û = u
        k = torch.where(is_zero, wu, slope_minus_one(wu))
        correction = (k - wu) / torch.where(is_zero, 1.0, w_square)
        u_hat = u + correction.unsqueeze(-1) * w
        return w.unbind(-2), u_hat.unbind(-2), self.b.unbind(-1), k

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        w, u_hat, b, k = self._layers()
        hs = []
        for w_l, u_l, b_l in zip(w, u_hat, b, strict=True):
            h = (_dot(w_l, x) + b_l).tanh()
            x = torch.addcmul(x, h.unsqueeze(-1), u_l)
            hs.append(h)
        return x, _ladj(k, hs)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
        w, u_hat, b, k = self._layers()
        hs = []
        for w_l, u_l, b_l, k_l in reversed(list(zip(w, u_hat, b, k.unbind(-1), strict=True))):
            # With p = wᵀx + b, y = x + û tanh(p) gives p + wᵀû tanh(p) = wᵀy + b.
            h = tanh_root(k_l, _dot(w_l, y) + b_l).tanh()
            y = torch.addcmul(y, h.unsqueeze(-1), u_l, value=-1)
            hs.append(h)
        return y, -_ladj(k, hs[::-1])

    def extra_repr(self) -> str:
        return f"{self.input_dim}, num_transforms={self.num_transforms}"


def _dot(w: Tensor, x: Tensor) -> Tensor:
    return x @ w if w.dim() == 1 else (x * w).sum(-1)


def _ladj(k: Tensor, hs: Sequence[Tensor]) -> Tensor:
    h = torch.stack(list(hs), -1)
    return torch.log1p(k * (1 - h * h)).sum(-1)


class ConditionalPlanar(ConditionalFlow):
    """Planar layers whose w, u and b depend on a context `(*, C)`; `.condition(context)` gives the transform."""

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        num_transforms: int = 1,
    ):
        super().__init__(
            Planar(input_dim, num_transforms=num_transforms), context_dim, hidden_dims
        )


def planar(input_dim: int, *, num_transforms: int = 1) -> Planar:
    """A planar flow of `num_transforms` layers: see `Planar`."""
    return Planar(input_dim, num_transforms=num_transforms)


def conditional_planar(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    num_transforms: int = 1,
) -> ConditionalPlanar:
    """A planar flow amortized over a context: see `ConditionalPlanar`."""
    return ConditionalPlanar(input_dim, context_dim, hidden_dims, num_transforms=num_transforms)
