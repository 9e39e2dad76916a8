"""Monotone rational-quadratic splines (Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# No bin takes less than this part of the box, in width or in height, and no knot has a smaller slope: a thousandfold
# contraction is more than a layer needs, and a float32 value (7 digits) still comes back from it with 4.
MIN_BIN = 1e-3
MIN_SLOPE = 1e-3
# The factor of raw widths and heights. The slope in the middle of a flat bin goes with the square of height over width, so
# that a unit in both would move its logarithm by 4, where one in the scale of an affine layer moves it by 1: networks that
# are sane there would emit splines here that float32 cannot invert. Halved, it is 2.
_BIN_SCALE = 0.5
# softplus of this is 1 - MIN_SLOPE: a raw slope of 0 means a slope of 1.
_SLOPE_SHIFT = math.log(math.expm1(1 - MIN_SLOPE))


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
    x = x.expand(torch.broadcast_shapes(x.shape, raw.shape[:-1]))
    raw = raw[(None,) * (x.dim() + 1 - raw.dim())]
    knots, raw_slopes = _knots(raw, num_bins, bound)

    # A value in the tails passes the spline as ±bound: autograd multiplies its gradient by zero, and it must be finite.
    inside = x.abs() < bound
    z = x.clamp(-bound, bound)
    k = (z >= knots[1 if inverse else 0, 1:-1]).sum(0)
    ends = torch.stack([k, k + 1])
    at = knots.expand(2, num_bins + 1, *x.shape).gather(1, ends.expand(2, 2, *x.shape))
    slopes = raw_slopes.expand(num_bins + 1, *x.shape).gather(0, ends)
    slopes = MIN_SLOPE + F.softplus(slopes + _SLOPE_SHIFT)

    value, slope = (_inverse if inverse else _forward)(z, at, slopes)
    return torch.where(inside, value, x), torch.where(inside, slope.log(), 0.0)


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


def _knots(raw: Tensor, num_bins: int, bound: float) -> tuple[Tensor, Tensor]:
    """Knots `(2, K + 1, *)`, in x and in y, from -bound to bound exactly, and their raw slopes `(K + 1, *)`."""
    K = num_bins
    # Bins come first from here on: what runs over them, softmax above all, then runs over whole vectors of elements, and
    # takes half the time that it takes over rows of eight.
    raw_bins, raw_slopes = raw.movedim(-1, 0).split([2 * K, K - 1])
    parts = (_BIN_SCALE * raw_bins).unflatten(0, (2, K)).softmax(1)
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


# The bin that holds a value has the corners `at` `(2, 2, *)` (x or y; lower or upper), a mean slope s, and slopes d0 and d1
# at its ends. With ξ and η the places of x and y between its ends, from 0 to 1, and with (1 - ξ) a + ξ b written a ⊕ b,
#     u = d0 ⊕ s,   v = s ⊕ d1,   D = v ⊕ u,   η = ξ u / D,   dη/dξ = s (u ⊕ v) / D²
# is the rational quadratic of the paper. All of s, d0, d1 are positive, hence so are their averages, whatever the rounding.


def _forward(x: Tensor, at: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """g(x) and g'(x)."""
    d0, d1 = slopes.unbind()
    x0, y0, w, h = _lower_and_size(at)
    s, xi = h / w, (x - x0) / w
    u, v = torch.lerp(d0, s, xi), torch.lerp(s, d1, xi)
    D = torch.lerp(v, u, xi)
    return y0 + h * (xi * u / D), torch.lerp(u, v, xi) * (s / D) ** 2


def _inverse(y: Tensor, at: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """g⁻¹(y) and its derivative.

    ξ u - η D = 0 is quadratic in ξ. With p = d0 (1 - η) - d1 η, its discriminant is r² = p² + 4 s² η (1 - η): positive
    throughout, and a sum without cancellation. Its root in [0, 1] has ξ : 1 - ξ = 2 s η : r + p = r - p : 2 s (1 - η), and so
    = 2 s η + r - p : 2 s (1 - η) + r + p, where nothing cancels that matters. At the root its derivative is r: dη/dξ = r / D.
    """
    d0, d1 = slopes.unbind()
    x0, y0, w, h = _lower_and_size(at)
    s, eta = h / w, (y - y0) / h
    zeta = 1 - eta
    p = d0 * zeta - d1 * eta
    a, b = 2 * s * eta, 2 * s * zeta
    r = (p * p + a * b).sqrt()
    a = a + (r - p)
    b = b + (r + p)
    xi = a / (a + b)
    D = torch.lerp(torch.lerp(s, d1, xi), torch.lerp(d0, s, xi), xi)
    return x0 + w * xi, D / (s * r)


def _lower_and_size(at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lower corner of a bin, its width and its height."""
    lower, upper = at.unbind(1)
    x0, y0 = lower.unbind()
    w, h = (upper - lower).unbind()
    return x0, y0, w, h
