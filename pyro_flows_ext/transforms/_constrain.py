"""What the families share: checks of arguments, and maps that keep every slope away from zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor, nn

# Where images (C, H, W) live.
IMAGE = constraints.independent(constraints.real, 3)

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


# Without a bound one stray activation of 20 scales by e²⁰, and a stack of layers overflows, or in float32 cannot be
# inverted. With this one a layer neither stretches nor shrinks more than the thousandfold that MIN_SLOPE stands for.
MAX_LOG_SCALE = -math.log(MIN_SLOPE)


def bounded(raw: Tensor, limit: float) -> Tensor:
    """c tanh(raw / c), c = `limit`: slope 1 at 0, small values hardly changed, and no gradient cut off as by clamping."""
    return limit * (raw / limit).tanh()


def bounded_affine(
    x: Tensor, shift: Tensor, raw: Tensor, *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y = shift + eˢ x, or its inverse, and the log-derivative ±s by element, with s = c tanh(raw / c), c = log 1000."""
    s = bounded(raw, MAX_LOG_SCALE)
    if inverse:
        return (x - shift) * (-s).exp(), -s
    return torch.addcmul(shift, x, s.exp()), s


def check_event(name: str, x: Tensor, shape: int | Sequence[int]) -> None:
    """Raises `ValueError` unless x is `(*, shape)`."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"{name}: expected a tensor of shape (*, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
        )


def check_event_dim(name: str, x: Tensor, event_dim: int) -> None:
    """Raises `ValueError` unless x has `event_dim` dimensions at least."""
    if x.dim() < event_dim:
        raise ValueError(
            f"{name}: expected {event_dim} event dimensions, got shape {tuple(x.shape)}"
        )


def check_positive(name: str, value: int) -> int:
    """`value` if it is a positive integer; `ValueError` otherwise."""
    if int(value) != value or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return int(value)


def read_event_shape(input_dim: int | Sequence[int]) -> torch.Size:
    """`(D,)` for vectors of D numbers, `(C, H, W)` for images; `ValueError` for anything else."""
    shape = tuple(input_dim) if isinstance(input_dim, Sequence) else (input_dim,)
    if len(shape) not in (1, 3):
        raise ValueError(f"input_dim: expected D or (C, H, W), got {input_dim!r}")
    return torch.Size(check_positive("input_dim", size) for size in shape)


def find_event_shape(module: nn.Module) -> torch.Size | None:
    """The event shape by the `input_dim` of the first part of a module that has one; None where none has."""
    for part in module.modules():
        input_dim: Any = getattr(part, "input_dim", None)
        if isinstance(input_dim, int | Sequence):
            return read_event_shape(input_dim)
    return None
