"""Planar flows (Rezende & Mohamed 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bounds import slope_minus_one
from .low_rank import LowRankTanh


class Planar(LowRankTanh):
    """y = x + û tanh(wᵀx + b), `num_layers` times in a row.

    log|det| = log(1 + wᵀû (1 - tanh²(wᵀx + b))), exact. û is u corrected along w so that wᵀû > -1 for any parameter
    value, `w = 0` included, which makes every layer invertible. Starts near the identity (û ≈ 0).

    Parameters of K layers: `w`, `u` `(K, D)`, `b` `(K, 1)`. Cost: O(KD) forward; the inverse adds one scalar root a
    layer (Newton, at most 14 steps, gradients by the implicit function theorem).

    Args:
        input_dim: D, for events `(*, D)`.
        num_layers: K, the number of layers.
        context_dim: number of context variables that w, u and b depend on.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: if `input_dim` or `num_layers` is not positive, or in a pass if the last dimension is not D.

    Example:
        >>> flow = Planar(3, num_layers=8, context_dim=2)
        >>> flow.condition(torch.zeros(5, 2)).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])

    References:
        Rezende & Mohamed 2015, Variational Inference with Normalizing Flows, eqs. 10 to 12 and app. A.1, with an
        exponential linear unit for their m(wᵀu): û = u wherever wᵀu >= 0, and u = 0 is the identity.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_layers: int = 1,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__(input_dim, num_layers)
        K, D = self.num_layers, self.input_dim
        self.w = nn.Parameter(torch.randn(K, D) / D**0.5)
        self.u = nn.Parameter(0.01 * torch.randn(K, D))
        self.b = nn.Parameter(0.1 * torch.randn(K, 1))
        self.add_hyper_network(context_dim, hidden_dims)

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
