"""Spline layers and the last linear map of their networks as one operation, which never holds the parameters of all splines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import fused
from ..ops.fused_splines import BLOCK, Spline, scale_bins
from ..ops.perceptron import Activation, chain, layer_gradients, run_hidden
from ..ops.splines import by_autograd
from .fused_affine import Network, join, parts

# Rows at a time on a CPU, where there are so many: blocks then have as many elements of them as `BLOCK` allows.
ROWS = 1024


class _Layer(NamedTuple):
    columns: tuple[slice, slice] | None
    activation: Activation
    residual: bool
    order: Tensor | None
    reach: Sequence[int] | None
    num_layers: int
    settings: tuple[int, float, bool]

    def to_rows(self, t: Tensor) -> Tensor:
        """t `(R, N)` with elements as rows `(N, R)`, in the order of the variables."""
        t = t.t()
        return t.contiguous() if self.order is None else t.index_select(0, self.order)

    def from_rows(self, rows: Tensor, out: Tensor) -> None:
        """Undoes `to_rows`, into `out` `(R, N)`."""
        if self.order is None:
            out.copy_(rows.t())
        else:
            out.t().index_copy_(0, self.order, rows)

    def of_elements(self, t: Tensor) -> Tensor:
        """Weights or biases `((3K - 1) N, *)` by parameter and element, in the order of the variables, scaled for `Spline`."""
        t = t.unflatten(0, (3 * self.settings[0] - 1, -1))
        if self.order is not None:
            t = t.index_select(1, self.order)
        return scale_bins(t, torch.empty(t.shape, dtype=t.dtype, device=t.device), self.settings[0])

    def from_elements(self, t: Tensor) -> Tensor:
        """Undoes `of_elements` for gradients, in place where it can."""
        if self.order is not None:
            t = t.index_select(1, self.order.argsort())
        return scale_bins(t, t, self.settings[0]).flatten(0, 1)

    def chunks(self, x: Tensor, num_elements: int) -> Iterator[slice]:
        """Slices of the rows, so long that a block is full."""
        size = max(ROWS, BLOCK // num_elements) if x.device.type == "cpu" else len(x)
        for start in range(0, len(x), size):
            yield slice(start, min(start + size, len(x)))

    def blocks(self, z: Tensor, width: int) -> Iterator[tuple[slice, slice, slice]]:
        """Of elements z `(N, R)`: slices of the elements, of all numbers in a row, and of the units that the former read."""
        N, rows = z.shape
        size = max(1, BLOCK // rows) if z.device.type == "cpu" else N
        for start in range(0, N, size):
            stop = min(start + size, N)
            units = slice(0, width if self.reach is None else self.reach[stop])
            yield slice(start, stop), slice(start * rows, stop * rows), units


def spline_layer(
    x: Tensor,
    columns: tuple[slice, slice] | None,
    network: Network,
    *,
    num_bins: int,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor] | None:
    """`rq_spline` of the columns that move by a network of the others, or of all by a masked one of all.

    Blocks of elements pass the last linear map and the spline one after the other, in the gradient too. So their parameters
    are in a cache, one row for each, and products of a masked network leave out the units that no element of a block reads.

    Args:
        x: `(R, D)`.
        columns: as in `affine_layer`.
        network: `(R, seen) -> (R, (3K - 1) N)`, by parameter and then by element.
        num_bins, bound, inverse: as in `rq_spline`.

    Returns:
        y `(R, D)` and the log-det `(R)`; None where ordinary operations have to run: see `ops.fused`.
    """
    weights, biases, activation, residual, order, reach = network
    tensors = (*weights, *biases)
    if len(weights) == 1:
        reach = None
    has_bias = biases[0].dim() == 1 or (len(biases) > 1 and biases[0].shape[:-1] == x.shape[:-1])
    if x.dim() != 2 or not has_bias or not len(x) or not fused.may_fuse(x, *tensors):
        return None
    settings = num_bins, bound, inverse
    layer = _Layer(columns, activation, residual, order, reach, len(weights), settings)
    if fused.needs_graph(x, *tensors):
        return _FusedSplineLayer.apply(layer, x, *tensors)
    return _run(layer, x, *tensors)[:2]


def _run(layer: _Layer, x: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
    """y and log-det; the outputs of hidden layers, their activations, and two tensors of every chunk."""
    n, K = layer.num_layers, layer.settings[0]
    seen, moved = parts(x, layer.columns)
    weights, biases = tensors[: n - 1], tensors[n:-1]
    outputs, activations = run_hidden(seen, weights, biases, layer.activation, layer.residual)
    h = outputs[-1] if outputs else seen
    weight, bias = layer.of_elements(tensors[n - 1]), layer.of_elements(tensors[-1])
    spline = Spline(*layer.settings, x)
    y, ladj = torch.empty_like(x), x.new_empty(len(x))
    passed, out = parts(y, layer.columns)
    kept = []
    for rows in layer.chunks(x, weight.shape[1]):
        z, read = layer.to_rows(moved[rows]), h[rows].t()
        raw = x.new_empty(3 * K * z.numel())
        found = x.new_empty(spline.NUM_FOUND, z.numel())
        flat = z.view(-1)
        for elements, at, units in layer.blocks(z, len(read)):
            block = raw[3 * K * at.start : 3 * K * at.stop].view(3 * K, -1)
            w, b = weight[:, elements, units].flatten(0, 1), bias[:, elements].reshape(-1, 1)
            # addmm would first write the bias to memory that is in no cache yet.
            torch.mm(w, read[units], out=block[:-1].view(len(w), -1)).add_(b)
            spline.locate(flat[at], block, found[:, at])
        value, log_slope = spline.value(flat, found)
        layer.from_rows(value.view_as(z), out[rows])
        torch.sum(log_slope.view_as(z), 0, out=ladj[rows])
        kept += [raw, found]
    if layer.columns is not None:
        passed.copy_(seen)
    return y, ladj, outputs, activations, kept


def _by_autograd(layer: _Layer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    n = layer.num_layers
    seen, moved = parts(x, layer.columns)
    theta = chain(seen, tensors[:n], tensors[n:], layer.activation, layer.residual)
    raw = theta.unflatten(-1, (3 * layer.settings[0] - 1, -1)).mT
    value, log_slope = by_autograd(moved, raw, *layer.settings)
    return join(seen, value, layer.columns), log_slope.sum(-1)


class _FusedSplineLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: _Layer, x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj, outputs, activations, kept = _run(layer, x, *tensors)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, *outputs, *activations, *kept)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, by_y: Tensor | None, by_ladj: Tensor | None) -> tuple[Any, ...]:
        layer, n = ctx.layer, ctx.layer.num_layers
        x, *saved = ctx.saved_tensors
        tensors, rest = saved[: 2 * n], saved[2 * n :]
        needed = ctx.needs_input_grad[1:]
        if not fused.may_write_gradient(by_y, by_ladj):

            def run(*args: Tensor) -> tuple[Tensor, Tensor]:
                return _by_autograd(layer, *args)

            return None, *fused.plain_gradient(run, (x, *tensors), needed, (by_y, by_ladj))
        if by_y is None:
            by_y = torch.zeros_like(x)
        if by_ladj is None:
            by_ladj = x.new_zeros(len(x))
        seen = parts(x, layer.columns)[0]
        outputs, activations, kept = rest[: n - 1], rest[n - 1 : 2 * n - 2], rest[2 * n - 2 :]
        h = outputs[-1] if outputs else seen
        by_passed, by_value = parts(by_y, layer.columns)
        by_x = torch.empty_like(by_y)
        by_seen, by_moved = parts(by_x, layer.columns)
        is_frozen = not (needed[n] or needed[-1])
        g, by_weight, by_bias = _last_gradients(
            layer, h, tensors[n - 1], tensors[-1], kept, by_value, by_ladj, by_moved, is_frozen
        )
        by_weights: list[Tensor | None] = [by_weight]
        by_biases: list[Tensor | None] = [by_bias]
        if n > 1:
            inputs = [seen, *outputs[:-1]]
            hidden = tensors[: n - 1], tensors[n:-1]
            needed_hidden = (*needed[1:n], *needed[n + 1 : -1])
            g, w, b = layer_gradients(
                g, *hidden, inputs, activations, layer.activation, layer.residual, needed_hidden
            )
            by_weights, by_biases = [*w, by_weight], [*b, by_bias]
            g = g.mm(tensors[0]) if needed[0] else g
        if not needed[0]:
            return None, None, *by_weights, *by_biases
        if layer.columns is None:
            by_x += g
        else:
            torch.add(by_passed, g, out=by_seen)
        return None, by_x, *by_weights, *by_biases


def _last_gradients(
    layer: _Layer,
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    kept: Sequence[Tensor],
    by_value: Tensor,
    by_ladj: Tensor,
    by_moved: Tensor,
    is_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by h, and by the last weight and bias; into `by_moved` that by the elements that move."""
    K, by_h = layer.settings[0], torch.empty_like(h)
    weight, bias = layer.of_elements(weight), layer.of_elements(bias)
    by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    spline, tensors = Spline(*layer.settings, h), iter(kept)
    for rows in layer.chunks(h, weight.shape[1]):
        raw, found = next(tensors), next(tensors)
        by_y = layer.to_rows(by_value[rows])
        by_log_slope = by_ladj[rows].expand_as(by_y).reshape(-1)
        by_z, by = spline.gradient(found, by_y.view(-1), by_log_slope)
        layer.from_rows(by_z.view_as(by_y), by_moved[rows])
        read, by_read, out = h[rows], by_h[rows], raw.new_empty(0)
        if layer.reach is not None:
            by_read.zero_()
        for elements, at, units in layer.blocks(by_y, h.shape[1]):
            block = raw[3 * K * at.start : 3 * K * at.stop].view(3 * K, -1)
            out = out if out.shape == block.shape else torch.empty_like(block)
            spline.spread(block, found[:, at], by[:, at], out)
            w = weight[:, elements, units].flatten(0, 1)
            g = out[:-1].view(len(w), -1)
            is_first = layer.reach is None and elements.start == 0
            by_read[:, units].addmm_(g.t(), w, beta=0 if is_first else 1)
            if not is_frozen:
                by_block = by_weight[:, elements, units]
                by_block += torch.mm(g, read[:, units]).view_as(by_block)
                by_bias[:, elements] += g.sum(1).view(3 * K - 1, -1)
    return by_h, layer.from_elements(by_weight), layer.from_elements(by_bias)
