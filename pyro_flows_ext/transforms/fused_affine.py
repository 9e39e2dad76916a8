"""Affine layers and their networks as one operation, with one gradient: no tensor is split, joined or read more than needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import fused
from ..ops.perceptron import Activation, chain, layer_gradients, run_layers
from .bounds import MAX_LOG_SCALE, bounded_affine


class Network(NamedTuple):
    """A perceptron `(R, seen) -> (R, P N)`: the first parameter of all N elements, then the second, and so on.

    That of an autoregressive layer has zeros in its last weight where an element does not read a unit: in `order` (None for 0,
    1, ...), the first i elements read the first `reach[i]` units of the last hidden layer.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: Activation
    residual: bool = False
    order: Tensor | None = None
    reach: Sequence[int] | None = None


class _Layer(NamedTuple):
    # The columns that the network reads, and those that move; None for all of them.
    columns: tuple[slice, slice] | None
    activation: Activation
    residual: bool
    num_layers: int
    inverse: bool


def parts(x: Tensor, columns: tuple[slice, slice] | None) -> tuple[Tensor, Tensor]:
    """The columns that the network reads, and those that move; None for all of them."""
    return (x, x) if columns is None else (x[:, columns[0]], x[:, columns[1]])


def join(seen: Tensor, value: Tensor, columns: tuple[slice, slice] | None) -> Tensor:
    """The inverse of `parts`, with new values for those that moved."""
    if columns is None:
        return value
    return torch.cat([seen, value] if columns[0].start == 0 else [value, seen], -1)


def affine_layer(
    x: Tensor, columns: tuple[slice, slice] | None, network: Network, *, inverse: bool
) -> tuple[Tensor, Tensor] | None:
    """`bounded_affine` of the columns that move by a network of the others, or of all by a masked one of all.

    Args:
        x: `(R, D)`.
        columns: what the network reads, and what moves, two slices that make up all columns; None: both are all.
        network: of the columns that it reads.
        inverse: as in `bounded_affine`.

    Returns:
        y `(R, D)` and the log-det `(R)`; None where ordinary operations have to run: see `ops.fused`.
    """
    weights, biases, activation, residual, *_ = network
    tensors = (*weights, *biases)
    has_bias = biases[0].dim() == 1 or biases[0].shape[:-1] == x.shape[:-1]
    if x.dim() != 2 or not has_bias or not fused.may_fuse(x, *tensors):
        return None
    layer = _Layer(columns, activation, residual, len(weights), inverse)
    if fused.needs_graph(x, *tensors):
        return _FusedAffine.apply(layer, x, *tensors)
    return _run(layer, x, *tensors)[:2]


def _run(layer: _Layer, x: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
    """y and log-det; tanh(raw / c), the slope, the inputs of all layers but the first, and the activations."""
    n = layer.num_layers
    seen, moved = parts(x, layer.columns)
    theta, inputs, activations = run_layers(
        seen, tensors[:n], tensors[n:], layer.activation, layer.residual
    )
    shift, raw = theta.chunk(2, -1)
    t = (raw * (1 / MAX_LOG_SCALE)).tanh_()
    log_slope = t * (-MAX_LOG_SCALE if layer.inverse else MAX_LOG_SCALE)
    slope = log_slope.exp()
    y = torch.empty_like(x)
    passed, out = parts(y, layer.columns)
    if layer.inverse:
        torch.sub(moved, shift, out=out).mul_(slope)
    else:
        torch.addcmul(shift, moved, slope, out=out)
    if layer.columns is not None:
        passed.copy_(seen)
    return y, log_slope.sum(-1), t, slope, inputs, activations


def _by_autograd(layer: _Layer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    n = layer.num_layers
    seen, moved = parts(x, layer.columns)
    theta = chain(seen, tensors[:n], tensors[n:], layer.activation, layer.residual)
    value, log_slope = bounded_affine(moved, *theta.chunk(2, -1), inverse=layer.inverse)
    return join(seen, value, layer.columns), log_slope.sum(-1)


class _FusedAffine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: _Layer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj, t, slope, inputs, activations = _run(layer, x, *tensors)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, t, slope, *tensors, *inputs, *activations)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, by_y: Tensor | None, by_ladj: Tensor | None) -> tuple[Any, ...]:
        layer, n = ctx.layer, ctx.layer.num_layers
        x, y, t, slope, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if not fused.may_write_gradient(by_y, by_ladj):

            def run(*args: Tensor) -> tuple[Tensor, Tensor]:
                return _by_autograd(layer, *args)

            tensors = (x, *saved[: 2 * n])
            return None, *fused.plain_gradient(run, tensors, needed, (by_y, by_ladj))
        if by_y is None:
            by_y = torch.zeros_like(y)
        weights, biases, rest = saved[:n], saved[n : 2 * n], saved[2 * n :]
        by_passed, by_value = parts(by_y, layer.columns)
        by_x = torch.empty_like(by_y)
        by_seen, by_moved = parts(by_x, layer.columns)
        torch.mul(by_value, slope, out=by_moved)
        by_theta = t.new_empty(len(t), 2 * t.shape[1])
        by_shift, by_raw = by_theta.chunk(2, -1)
        # ∂value/∂log_slope is slope · x forwards, and the value itself backwards.
        left, right = (by_value, y) if layer.inverse else (by_moved, x)
        right = parts(right, layer.columns)[1]
        if by_ladj is None:
            by_log_slope = left * right
        else:
            by_log_slope = torch.addcmul(by_ladj.unsqueeze(-1), left, right)
        torch.mul(by_log_slope, 1 - t * t, out=by_raw)
        if layer.inverse:
            by_raw.neg_()
            torch.neg(by_moved, out=by_shift)
        else:
            by_shift.copy_(by_value)
        seen = parts(x, layer.columns)[0]
        g, by_weights, by_biases = layer_gradients(
            by_theta, weights, biases, [seen, *rest[: n - 1]], rest[n - 1 :], layer.activation, layer.residual, needed[1:]
        )  # fmt: skip
        if needed[0]:
            if layer.columns is None:
                by_x.addmm_(g, weights[0])
            else:
                torch.addmm(by_passed, g, weights[0], out=by_seen)
        return None, by_x if needed[0] else None, *by_weights, *by_biases
