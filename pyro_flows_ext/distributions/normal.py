"""Diagonal normals with location and scale from the output of a network, `params` `(*, 2D)`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..transforms.bounds import bounded_affine


def affine_by(x: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """loc + scale ⊙ x or its inverse, and the log-derivatives, for x `(*, D)`. Scales are between 1/1000 and 1000."""
    return bounded_affine(x, *params.chunk(2, -1), inverse=inverse)


def draw_by(params: Tensor) -> Tensor:
    """A draw from N(loc, scale²), `(*, D)`."""
    return affine_by(torch.randn_like(params.chunk(2, -1)[0]), params, inverse=False)[0]


def log_normal_by(u: Tensor, params: Tensor) -> Tensor:
    """log N(u; loc, scale²), `(*)`."""
    noise, log_slope = affine_by(u, params, inverse=True)
    return log_slope.sum(-1) + log_standard_normal(noise)


def log_standard_normal(u: Tensor) -> Tensor:
    """log N(u; 0, I), `(*, D)` -> `(*)`."""
    return -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)
