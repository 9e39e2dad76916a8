"""Rational-quadratic splines on the circle (Rezende et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rational_quadratic import MIN_BIN, end_slopes
from .shapes import broadcast_shapes
from .splines import knots_of, of_bins


def circular_rq_spline(x: Tensor, raw: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """y = g(x; raw) + φ on the circle [-π, π): a monotone spline with g(±π) = ±π and one slope at both ends, and a turn.

    raw holds K widths, K heights, the slopes of the K - 1 inner knots, that of the knot at ±π, and φ. So log g' is
    continuous around the circle; raw = 0 is the identity. Cost: as `rq_spline`.

    Args:
        x: angles `(*)`, of which the turns are taken off.
        raw: `(*, 3K + 1)`, broadcast against x.
        inverse: whether to apply the inverse.

    Returns:
        y `(*)` in [-π, π) and log g'(x) `(*)`, or x and the log-slope of the inverse, exact.

    Raises:
        ValueError: unless the last dimension of raw is 3K + 1 with 1 <= K < 1000.

    Example:
        >>> y, ladj = circular_rq_spline(torch.tensor([0.5, 4.0]), torch.zeros(13))
        >>> y.round(decimals=4)
        tensor([ 0.5000, -2.2832])

    References:
        Rezende, Papamakarios, Racanière, Albergo, Kanwar, Shanahan & Cranmer 2020, Normalizing Flows on Tori and
        Spheres, section 2.1.3.
    """
    size = raw.shape[-1] if raw.dim() else 0
    K = (size - 1) // 3
    if size % 3 != 1 or not 1 <= K < 1 / MIN_BIN:
        raise ValueError(
            f"raw: expected shape (*, 3K + 1) for K bins, 1 <= K < {round(1 / MIN_BIN)}, got {tuple(raw.shape)}"
        )
    x = x.expand(broadcast_shapes(x.shape, raw.shape[:-1]))
    raw = raw[(None,) * (x.dim() + 1 - raw.dim())]
    spline, end, turn = raw.split([3 * K - 1, 1, 1], -1)
    knots, slopes = knots_of(spline, K, math.pi)
    end = end.movedim(-1, 0)
    slopes = torch.cat([end, slopes[1:-1], end])
    turn = turn.squeeze(-1)

    z = wrap(x - turn if inverse else x)
    k = (z >= knots[1 if inverse else 0, 1:-1]).sum(0)
    ends = torch.stack([k, k + 1])
    of_bin = end_slopes(slopes.expand(K + 1, *x.shape).gather(0, ends))
    value, slope = of_bins(z, knots, ends, of_bin, inverse)
    return wrap(value if inverse else value + turn), slope.log()


def wrap(angle: Tensor) -> Tensor:
    """The angle without whole turns, in [-π, π)."""
    turned = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    # A remainder of a small negative number rounds to a whole turn.
    return torch.where(turned >= math.pi, turned - 2 * math.pi, turned)
