"""Planar flows (Rezende & Mohamed 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._constrain import slope_minus_one
from ._low_rank import LowRankTanh
from .conditional import ConditionalFlow


class Planar(LowRankTanh):
    """y = x + û tanh(wᵀx + b), `num_layers` times in a row.

    log|det| = log(1 + wᵀû (1 - tanh²(wᵀx + b))), exact; û is u corrected along w so that wᵀû > -1 for any parameter
    value (`w = 0` included), which makes every layer invertible. Starts near the identity (û ≈ 0).

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters for K layers: `w`, `u` `(K, D)`, `b` `(K, 1)`. The
    constrained û of all layers come from one batched operation.
    Cost: O(KD) forward; the inverse adds one scalar root a layer (Newton, at most 14 steps, gradients by the implicit
    function theorem).
    Raises `ValueError` when the last dimension is not D.

    Source: Rezende & Mohamed 2015, Variational Inference with Normalizing Flows, eqs. 10 to 12 and app. A.1, with
    an exponential linear unit for their m(wᵀu): û = u wherever wᵀu >= 0, and u = 0 is the identity.
    """

    def __init__(self, input_dim: int, *, num_layers: int = 1):
        super().__init__(input_dim, num_layers)
        K, D = self.num_layers, self.input_dim
        self.w = nn.Parameter(torch.randn(K, D) / D**0.5)
        self.u = nn.Parameter(0.01 * torch.randn(K, D))
        self.b = nn.Parameter(0.1 * torch.randn(K, 1))

    def _factors(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
        w, u = self.w, self.u
        wu = (w * u).sum(-1, keepdim=True)
        # At w = 0, wᵀû is 0 whatever û is, and the correction, which stays below ‖u‖²‖w‖, drops out.
        w_square = (w * w).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        k = slope_minus_one(wu)
        u_hat = torch.addcmul(u, (k - wu) / w_square, w)
        if self.num_layers == 1:
            return [w], [u_hat], k
        return w.split(1, -2), u_hat.split(1, -2), k


class ConditionalPlanar(ConditionalFlow):
    """Planar layers whose w, u and b depend on a context `(*, C)`; `.condition(context)` gives the transform."""

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        num_layers: int = 1,
    ):
        super().__init__(Planar(input_dim, num_layers=num_layers), context_dim, hidden_dims)


def planar(input_dim: int, *, num_layers: int = 1) -> Planar:
    """A planar flow of `num_layers` layers: see `Planar`."""
    return Planar(input_dim, num_layers=num_layers)


def conditional_planar(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    num_layers: int = 1,
) -> ConditionalPlanar:
    """A planar flow amortized over a context: see `ConditionalPlanar`."""
    return ConditionalPlanar(input_dim, context_dim, hidden_dims, num_layers=num_layers)
