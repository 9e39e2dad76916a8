"""Maps that keep every slope of a transform away from zero and from infinity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The slope of a layer along its own direction never falls below this, for any parameter value: a thousandfold
# contraction is more than a layer needs, and a float32 value (7 digits) still comes back from it with 4.
MIN_SLOPE = 1e-3

# Without a bound one stray activation of 20 scales by e²⁰, and a stack of layers overflows, or in float32 cannot be
# inverted. With this bound a layer stretches or shrinks at most a thousandfold, as MIN_SLOPE.
MAX_LOG_SCALE = -math.log(MIN_SLOPE)


def slope_minus_one(s: Tensor) -> Tensor:
    """Maps the real line onto (-a, ∞), a = 1 - MIN_SLOPE, increasingly: s for s >= 0, a (exp(s / a) - 1) below.

    Replaces m(s) = softplus(s) - 1 of Rezende & Mohamed (2015, app. A.1), whose value at 0 is not 0: their planar
    layers do not start at the identity, and their û has a pole at w = 0. This map is the identity wherever the
    constraint holds anyway, and has value 0 and slope 1 at 0, which keeps û continuous there.
    """
    return F.celu(s, alpha=1 - MIN_SLOPE)


def bounded(raw: Tensor, limit: float) -> Tensor:
    """c tanh(raw / c), c = `limit`: slope 1 at 0, and, unlike clamping, a nonzero gradient everywhere."""
    return limit * (raw / limit).tanh()


def bounded_affine(
    x: Tensor, shift: Tensor, raw: Tensor, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y = shift + eˢ x, or its inverse, and the elementwise log-derivative ±s, with s = c tanh(raw / c), c = log 1000."""
    s = bounded(raw, MAX_LOG_SCALE)
    if inverse:
        return (x - shift) * (-s).exp(), -s
    return torch.addcmul(shift, x, s.exp()), s
