"""Diagonal normals with location and scale from the output of a network: `params` `(*, 2D)`, or `(*, 2C, H, W)` of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..transforms.bounds import bounded_affine


def affine_by(
    x: Tensor, params: Tensor, *, inverse: bool, event_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """loc + scale ⊙ x or its inverse, and the log-derivatives, for x `(*, D)`. Scales are between 1/1000 and 1000."""
    return bounded_affine(x, *params.chunk(2, -event_dim), inverse=inverse)


def draw_by(params: Tensor, event_dim: int = 1) -> Tensor:
    """A draw from N(loc, scale²), `(*, D)`."""
    noise = torch.randn_like(params.chunk(2, -event_dim)[0])
    return affine_by(noise, params, inverse=False, event_dim=event_dim)[0]


def log_normal_by(u: Tensor, params: Tensor, event_dim: int = 1) -> Tensor:
    """log N(u; loc, scale²), `(*)`."""
    noise, log_slope = affine_by(u, params, inverse=True, event_dim=event_dim)
    return sum_event(log_slope, event_dim) + log_standard_normal(noise, event_dim)


def log_standard_normal(u: Tensor, event_dim: int = 1) -> Tensor:
    """log N(u; 0, I), `(*, D)` -> `(*)`."""
    return -0.5 * sum_event(u.square() + math.log(2 * math.pi), event_dim)


def sum_event(x: Tensor, event_dim: int) -> Tensor:
    """The sum over the last `event_dim` dimensions."""
    return x.sum(tuple(range(-event_dim, 0)))
