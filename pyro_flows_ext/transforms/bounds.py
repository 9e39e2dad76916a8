"""Maps that keep every slope of a transform away from zero and from infinity."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import fused

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
        s = -s
        return (x - shift) * s.exp(), s
    return torch.addcmul(shift, x, s.exp()), s


def bounded_affine_by(x: Tensor, theta: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """`bounded_affine` of x `(*, N)` with shift and raw in theta `(*, 2, N)`, in fewer passes over memory where it is large."""
    if theta.shape != (*x.shape[:-1], 2, *x.shape[-1:]) or not fused.may_fuse(x, theta):
        return _by_autograd(x, theta, inverse)
    if fused.needs_graph(x, theta):
        return _BoundedAffine.apply(x, theta, inverse)
    return _one_pass(x, theta, inverse)[:2]


def _by_autograd(x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    shift, raw = theta.unbind(-2)
    return bounded_affine(x, shift, raw, inverse=inverse)


def _one_pass(x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, log-derivative, tanh(raw / c) and the derivative itself."""
    shift, raw = theta.unbind(-2)
    t = (raw * (1 / MAX_LOG_SCALE)).tanh_()
    log_slope = t * (-MAX_LOG_SCALE if inverse else MAX_LOG_SCALE)
    slope = log_slope.exp()
    value = (x - shift).mul_(slope) if inverse else torch.addcmul(shift, x, slope)
    return value, log_slope, t, slope


class _BoundedAffine(torch.autograd.Function):
    """`bounded_affine_by`, with the gradient in five passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        value, log_slope, t, slope = _one_pass(x, theta, inverse)
        ctx.inverse = inverse
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, theta, value, t, slope)
        return value, log_slope

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        x, theta, value, t, slope = ctx.saved_tensors
        if not fused.may_write_gradient(*cotangents):
            run = partial(_by_autograd, inverse=ctx.inverse)
            return *fused.plain_gradient(
                run, (x, theta), ctx.needs_input_grad[:2], cotangents
            ), None
        by_value, by_log_slope = cotangents
        if by_value is None:
            by_value = torch.zeros_like(value)
        # ∂value/∂log_slope is slope · x forwards, and the value itself backwards.
        by_x = by_value * slope
        left, right = (by_value, value) if ctx.inverse else (by_x, x)
        by_slope = (
            left * right if by_log_slope is None else torch.addcmul(by_log_slope, left, right)
        )
        by_theta = torch.empty_like(theta)
        by_shift, by_raw = by_theta.unbind(-2)
        by_shift.copy_(by_value)
        torch.mul(by_slope, 1 - t * t, out=by_raw)
        if ctx.inverse:
            torch.neg(by_x, out=by_shift)
            by_raw.neg_()
        return by_x, by_theta, None
