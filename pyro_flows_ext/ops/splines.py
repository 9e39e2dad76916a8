"""Monotone rational-quadratic splines (Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused
from .fused_splines import fused_rq_spline
from .rational_quadratic import BIN_SCALE, MIN_BIN, backwards, end_slopes, forwards
from .shapes import broadcast_shapes


def rq_spline(
    x: Tensor, raw: Tensor, *, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """y = g(x; raw) elementwise, g a monotone rational-quadratic spline on [-bound, bound] and the identity outside.

    g has K bins; raw holds K widths and K heights (halved, before a softmax) and the slopes of the K - 1 inner knots
    (before a softplus). The slopes at ±bound are 1, so that g is continuously differentiable everywhere; raw = 0 is the
    identity, and any real raw gives an increasing g. Cost: O(K) time and memory an element, the same in both
    directions. A raw that is a transposed view of `(*, 3K - 1, D)` spares a copy.

    Args:
        x: `(*)`.
        raw: `(*, 3K - 1)`, broadcast against x.
        bound: half the width of the box.
        inverse: whether to apply g⁻¹, in closed form too.

    Returns:
        y `(*)` and log g'(x) `(*)`, or g⁻¹(x) and log (g⁻¹)'(x), exact.

    Raises:
        ValueError: unless the last dimension of raw is 3K - 1 with 1 <= K < 1000, and bound is positive.

    Example:
        >>> y, ladj = rq_spline(torch.tensor([0.5, 9.0]), torch.zeros(11), bound=3.0)
        >>> y.round(decimals=4)
        tensor([0.5000, 9.0000])

    References:
        Durkan et al. 2019, Neural Spline Flows, section 3.1, with the terms arranged into sums of positive ones.
    """
    num_bins = _check(raw, bound)
    is_large = raw.numel() >= fused.MIN_NUMEL
    if is_large and raw.shape[:-1] == x.shape and x.dim() and fused.may_fuse(x, raw):
        return fused_rq_spline(x, raw, num_bins, bound, inverse)
    return by_autograd(x, raw, num_bins, bound, inverse)


def by_autograd(
    x: Tensor, raw: Tensor, num_bins: int, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`rq_spline` by operations that autograd differentiates, to any order."""
    x = x.expand(broadcast_shapes(x.shape, raw.shape[:-1]))
    raw = raw[(None,) * (x.dim() + 1 - raw.dim())]
    knots, raw_slopes = knots_of(raw, num_bins, bound)

    # A value in the tails passes the spline as ±bound: autograd multiplies its gradient by zero, and it must be finite.
    inside = x.abs() < bound
    z = x.clamp(-bound, bound)
    k = (z >= knots[1 if inverse else 0, 1:-1]).sum(0)
    ends = torch.stack([k, k + 1])
    slopes = raw_slopes.expand(num_bins + 1, *x.shape).gather(0, ends)
    value, slope = of_bins(z, knots, ends, end_slopes(slopes), inverse)
    return torch.where(inside, value, x), torch.where(inside, slope.log(), 0.0)


def of_bins(
    z: Tensor, knots: Tensor, ends: Tensor, slopes: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """g(z) or g⁻¹(z) and the slope, with the numbers of the knots at the ends of the bin of z, and the slopes there."""
    at = knots.expand(*knots.shape[:2], *z.shape).gather(1, ends.expand(2, 2, *z.shape))
    lower, upper = at.unbind(1)
    size, searched = upper - lower, 1 if inverse else 0
    between = (z - lower[searched]) / size[searched]
    value, slope, *_ = (backwards if inverse else forwards)(between, lower, size, slopes)
    return value, slope


def _check(raw: Tensor, bound: float) -> int:
    """The number of bins that raw has parameters for."""
    size = raw.shape[-1] if raw.dim() else 0
    num_bins = (size + 1) // 3
    if size % 3 != 2 or num_bins * MIN_BIN >= 1:
        raise ValueError(
            f"raw: expected shape (*, 3K - 1) for K bins, 1 <= K < {round(1 / MIN_BIN)}, got {tuple(raw.shape)}"
        )
    if not bound > 0:
        raise ValueError(f"bound: expected a positive number, got {bound!r}")
    return num_bins


def knots_of(raw: Tensor, num_bins: int, bound: float) -> tuple[Tensor, Tensor]:
    """Knots `(2, K + 1, *)`, in x and in y, from -bound to bound exactly, and their raw slopes `(K + 1, *)`."""
    K = num_bins
    # Bins come first from here on: what runs over them, softmax above all, then runs over whole vectors of elements, and
    # takes half the time that it takes over rows of eight.
    raw_bins, raw_slopes = raw.movedim(-1, 0).split([2 * K, K - 1])
    parts = (BIN_SCALE * raw_bins).unflatten(0, (2, K)).softmax(1)
    # The j-th inner knot is -bound + 2 bound Σ_{i<j} (MIN_BIN + (1 - K MIN_BIN) parts_i).
    least = torch.arange(1, K, dtype=parts.dtype, device=parts.device) * (2 * bound * MIN_BIN)
    inner = torch.add(
        (least - bound).reshape(-1, *[1] * (raw.dim() - 1)),
        parts[:, :-1].cumsum(1),
        alpha=2 * bound * (1 - K * MIN_BIN),
    )
    batch = raw.shape[:-1]
    first = parts.new_full((), -bound).expand(2, 1, *batch)
    zero = raw_slopes.new_zeros(()).expand(1, *batch)
    return torch.cat([first, inner, -first], 1), torch.cat([zero, raw_slopes, zero])
