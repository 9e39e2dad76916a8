"""The test energies of Rezende & Mohamed (2015, table 1): unnormalised densities exp(-U(z)) on the plane.

Shapes: z `(*, 2)` -> U `(*)`, in nats. Raises `ValueError` if the last dimension is not 2. Sums of exponentials are taken
in log space: U and its gradient are finite far outside the modes.

U1 is normalisable on the plane. U2 to U4 are periodic along z1: their normaliser is over |z1| <= 4, and a fit must keep z1
there (a uniform prior, a penalty).

References: Rezende & Mohamed 2015, Variational Inference with Normalizing Flows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Energy:
    """An energy U: `function(z)` of `(*, 2)` -> `(*)`; `log_z` is log ∫ exp(-U) dz in nats, over |z1| <= `z1_limit`."""

    function: Callable[[Tensor], Tensor]
    log_z: float
    z1_limit: float
    description: str

    def __call__(self, z: Tensor) -> Tensor:
        """U(z), `(*, 2)` -> `(*)`."""
        return self.function(z)


def u1(z: Tensor) -> Tensor:
    """½((‖z‖ - 2) / .4)² - log(exp(-½((z1 - 2) / .6)²) + exp(-½((z1 + 2) / .6)²)): a ring with two lobes."""
    z1, _ = _split(z)
    # ‖z‖ has no gradient at the origin (0 / 0); hypot of a value that is never both zeros has one everywhere, and it
    # moves U there by less than rounding does.
    radius = (z.square().sum(-1) + torch.finfo(z.dtype).tiny).sqrt()
    lobes = torch.logaddexp(_log_bump(z1 - 2, 0.6), _log_bump(z1 + 2, 0.6))
    return -_log_bump(radius - 2, 0.4) - lobes


def u2(z: Tensor) -> Tensor:
    """½((z2 - w1) / .4)², w1 = sin(2π z1 / 4): a sine-shaped ridge."""
    z1, z2 = _split(z)
    return -_log_bump(z2 - _w1(z1), 0.4)


def u3(z: Tensor) -> Tensor:
    """-log(exp(-½((z2 - w1) / .35)²) + exp(-½((z2 - w1 + w2) / .35)²)), w2 = 3 exp(-½((z1 - 1) / .6)²): a ridge that
    splits in two and joins again."""
    z1, z2 = _split(z)
    offset = z2 - _w1(z1)
    w2 = 3 * _log_bump(z1 - 1, 0.6).exp()
    return -torch.logaddexp(_log_bump(offset, 0.35), _log_bump(offset + w2, 0.35))


def u4(z: Tensor) -> Tensor:
    """-log(exp(-½((z2 - w1) / .4)²) + exp(-½((z2 - w1 + w3) / .35)²)), w3 = 3 σ((z1 - 1) / .3): a ridge that forks."""
    z1, z2 = _split(z)
    offset = z2 - _w1(z1)
    w3 = 3 * ((z1 - 1) / 0.3).sigmoid()
    return -torch.logaddexp(_log_bump(offset, 0.4), _log_bump(offset + w3, 0.35))


def _split(z: Tensor) -> tuple[Tensor, Tensor]:
    if z.dim() == 0 or z.shape[-1] != 2:
        raise ValueError(f"expected points of shape (*, 2), got {tuple(z.shape)}")
    return z[..., 0], z[..., 1]


def _log_bump(x: Tensor, scale: float) -> Tensor:
    return -0.5 * (x / scale).square()


def _w1(z1: Tensor) -> Tensor:
    return (2 * math.pi / 4 * z1).sin()


ENERGIES = {
    "u1": Energy(u1, 1.8775, math.inf, "a ring with two lobes"),
    "u2": Energy(u2, 2.0821, 4.0, "a sine-shaped ridge"),
    "u3": Energy(u3, 2.6417, 4.0, "a ridge that splits in two and joins again"),
    "u4": Energy(u4, 2.7107, 4.0, "a ridge that forks"),
}
