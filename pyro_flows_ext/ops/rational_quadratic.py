"""The rational quadratic in one bin of a monotone spline: value, slope, and their gradient (Durkan et al. 2019, section 3.1)."""

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
BIN_SCALE = 0.5
# softplus of this is 1 - MIN_SLOPE: a raw slope of 0 means a slope of 1.
SLOPE_SHIFT = math.log(math.expm1(1 - MIN_SLOPE))


def end_slopes(raw: Tensor) -> Tensor:
    """The slope at a knot; that of a raw 0 is 1."""
    return MIN_SLOPE + F.softplus(raw + SLOPE_SHIFT)


# The bin that holds a value has the lower corner (x0, y0), the width w and the height h, a mean slope s = h / w, and slopes d0
# and d1 at its ends. With ξ and η the places of x and y between its ends, from 0 to 1, and (1 - ξ) a + ξ b written a ⊕ b,
#     u = d0 ⊕ s,   v = s ⊕ d1,   D = v ⊕ u,   η = ξ u / D,   dη/dξ = s (u ⊕ v) / D²
# is the rational quadratic of the paper. All of s, d0, d1 are positive, hence so are their averages, whatever the rounding.
# Corners, sizes and slopes are `(2, *)`, places `(*)`.


def forwards(xi: Tensor, lower: Tensor, size: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """g(x) and g'(x)."""
    d0, d1 = slopes.unbind()
    w, h = size.unbind()
    s = h / w
    u, v = torch.lerp(d0, s, xi), torch.lerp(s, d1, xi)
    D = torch.lerp(v, u, xi)
    return lower[1] + h * (xi * u / D), torch.lerp(u, v, xi) * (s / D) ** 2


def backwards(
    eta: Tensor, lower: Tensor, size: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """g⁻¹(y), its derivative, and its place ξ in the bin.

    ξ u - η D = 0 is quadratic in ξ. With p = d0 (1 - η) - d1 η, its discriminant is r² = p² + 4 s² η (1 - η): positive
    throughout, and a sum without cancellation. Its root in [0, 1] has ξ : 1 - ξ = 2 s η : r + p = r - p : 2 s (1 - η), and so
    = 2 s η + r - p : 2 s (1 - η) + r + p, where nothing cancels that matters. At the root its derivative is r: dη/dξ = r / D.
    """
    d0, d1 = slopes.unbind()
    w, h = size.unbind()
    s = h / w
    zeta = 1 - eta
    p = d0 * zeta - d1 * eta
    a, b = 2 * s * eta, 2 * s * zeta
    r = (p * p + a * b).sqrt()
    a = a + (r - p)
    b = b + (r + p)
    xi = a / (a + b)
    D = torch.lerp(torch.lerp(s, d1, xi), torch.lerp(d0, s, xi), xi)
    return lower[0] + w * xi, D / (s * r), xi


def gradient(
    xi: Tensor,
    size: Tensor,
    slopes: Tensor,
    by_value: Tensor,
    by_log_slope: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of g(x) and log g'(x): by x, by (x0, y0), by (w, h) and by (d0, d1), the last three `(2, *)`.

    With η = ξ u / D, Q = u ⊕ v and log g' = log Q + 2 log s - 2 log D, in reverse order. `inverse`: of x = g⁻¹(y) and -log g'(x),
    by y and by the rest. There dx = (dy - ∂g/∂θ dθ) / g', so that the gradient by θ is that of g and log g' for other
    cotangents.
    """
    d0, d1 = slopes.unbind()
    w, h = size.unbind()
    s = h / w
    u, v = torch.lerp(d0, s, xi), torch.lerp(s, d1, xi)
    D, Q = torch.lerp(v, u, xi), torch.lerp(u, v, xi)
    # Derivatives by ξ at fixed ends, of u, v, and of D and -Q by the weights of their averages.
    of_u, of_v, change = s - d0, d1 - s, v - u
    by_x = by_value
    if inverse:
        curvature = torch.lerp(of_u, of_v, xi).add_(change).div_(Q)
        curvature.sub_(torch.lerp(of_v, of_u, xi).sub_(change).div_(D), alpha=2).div_(w)
        slope = (s / D).square_().mul_(Q)
        by_argument = torch.addcmul(by_value, by_log_slope, curvature, value=-1).div_(slope)
        by_x, by_value, by_log_slope = -by_value, -by_argument, -by_log_slope
    eta = (xi * u).div_(D)
    by_Q = torch.div(by_log_slope, Q, out=Q)
    by_xi_u = (by_value * h).div_(D)
    by_D = torch.div(by_log_slope, D, out=D).mul_(-2).addcmul_(by_xi_u, eta, value=-1)
    by_u = torch.lerp(by_Q, by_D, xi).addcmul_(by_xi_u, xi)
    by_v = torch.lerp(by_D, by_Q, xi)
    by_slopes, lower, by_size = (torch.empty_like(size) for _ in range(3))
    torch.mul(by_v, xi, out=by_slopes[1])
    torch.addcmul(by_u, by_u, xi, value=-1, out=by_slopes[0])
    by_s = (by_log_slope / s).mul_(2).add_(by_u).add_(by_v).sub_(by_slopes[0]).sub_(by_slopes[1])
    if not inverse:
        by_xi = by_xi_u.mul_(u).addcmul_(by_Q.sub_(by_D), change)
        by_argument = by_x = by_xi.addcmul_(by_v, of_v).addcmul_(by_u, of_u).div_(w)
    by_ratio = by_s.div_(w)
    torch.neg(by_x, out=lower[0])
    lower[1] = by_value
    torch.mul(lower[0], xi, out=by_size[0]).addcmul_(by_ratio, s, value=-1)
    torch.addcmul(by_ratio, by_value, eta, out=by_size[1])
    return by_argument, lower, by_size, by_slopes
