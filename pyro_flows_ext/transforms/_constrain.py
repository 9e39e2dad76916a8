"""What the rank-one families share: a shape check, and the map that keeps their slopes positive."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# The slope of a layer along its own direction never falls below this, for any parameter value: a thousandfold
# contraction is more than a layer needs, and a float32 value (7 digits) still comes back from it with 4.
MIN_SLOPE = 1e-3


def slope_minus_one(s: Tensor) -> Tensor:
    """An increasing map of the real line onto (-a, ∞), a = 1 - MIN_SLOPE: s for s >= 0, a (exp(s / a) - 1) below.

    Rethinks m(s) = softplus(s) - 1 of Rezende & Mohamed (2015, app. A.1), whose value at 0 is not 0: their planar
    layers start away from the identity, and their û has a pole at w = 0. This one changes nothing where the
    constraint holds anyway, and has the value and the slope of the identity at 0, which leaves û continuous there.
    """
    return F.celu(s, alpha=1 - MIN_SLOPE)


def check_event(name: str, x: Tensor, dim: int) -> None:
    """Raises `ValueError` unless x is `(*, dim)`."""
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ValueError(f"{name}: expected a tensor of shape (*, {dim}), got {tuple(x.shape)}")


def check_positive(name: str, value: int) -> int:
    """`value` if it is a positive integer; `ValueError` otherwise."""
    if int(value) != value or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return int(value)
