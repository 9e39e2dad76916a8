"""Rational-quadratic splines as one operation: block of elements by block, with the gradient in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import may_write_gradient, needs_graph, plain_gradient
from .rational_quadratic import (
    BIN_SCALE,
    MIN_BIN,
    MIN_SLOPE,
    SLOPE_SHIFT,
    backwards,
    forwards,
    gradient,
)

# Elements at a time on a CPU: in passes over all parameters, which fall out of the second-level cache if there are more, and in
# formulas of one bin, where the cost of a call to torch shows if there are fewer.
BLOCK = 8192
LONG_BLOCK = 32768


class _Scratch(NamedTuple):
    """Memory and constants for blocks of one size. Views are made once: each takes as long as an operation on 1000 numbers."""

    # [j <= k] for j = 0, ..., K `(K + 1, n)`: the first row is one and the last zero. Then parts of it.
    masks: Tensor
    inner_masks: Tensor
    before: Tensor
    # [j = k] `(K, n)`, and without the first or the last.
    chosen: Tensor
    not_first: Tensor
    not_last: Tensor
    # `(3, K, n)`, and parts of it.
    products: Tensor
    of_bins: Tensor
    of_slopes: Tensor
    sums: Sequence[Tensor]
    inner_sums: Tensor
    knots: Tensor
    # 0, ..., K - 1 `(K, 1)`, and the inner knots less what the softmax adds.
    numbers: Tensor
    offsets: Tensor


class Spline:
    """Rational-quadratic splines of n elements and their parameters `(3K, n)`, one row for each parameter.

    The rows are the widths and the heights, both times `BIN_SCALE`, the slopes, and one that is free. Sums, maxima and choices
    over the bins of an element are then sums of whole vectors. Choices multiply by masks of zeros and ones in the dtype of x:
    operations on booleans and by index take several times as long.

    `locate`, by blocks of `BLOCK` elements, writes the bin of an element to `found`, of `NUM_FOUND` rows; `value` takes it from
    there. `gradient` returns the gradient by the bin in `NUM_BY` rows, of which `spread` makes that by the parameters.

    Args:
        num_bins: K.
        bound: half the width of the box.
        inverse: whether to compute g⁻¹.
        like: a tensor of the dtype and device of all arguments.
    """

    # The slope at the lower end, width, height, the slope at the upper end; lower corner; scale of the softmax; derivatives of
    # the slopes; number of the bin, place ξ in it, and whether the element is within the box.
    NUM_FOUND = 13
    # By the first six of these, and the mean of the softmax's gradient.
    NUM_BY = 8

    def __init__(self, num_bins: int, bound: float, inverse: bool, like: Tensor):
        self.num_bins, self.bound, self.inverse, self.like = num_bins, bound, inverse, like
        # A bin takes `least` of the box, and its part of `rest`.
        self.least = 2 * bound * MIN_BIN
        self.rest = 2 * bound - num_bins * self.least
        limit = torch.tensor(bound, dtype=like.dtype)
        self._below_bound = limit.nextafter(torch.zeros_like(limit)).item()
        self._scratch: _Scratch | None = None

    def locate(self, x: Tensor, raw: Tensor, found: Tensor) -> None:
        """Writes the bins of x `(n)`, but for their scale; overwrites `raw`, which `spread` takes next."""
        K, searched = self.num_bins, 1 if self.inverse else 0
        scratch, scale = self._buffers(x.shape[0]), found[6:8]
        raw[-1] = 0
        groups = raw.view(3, K, -1)
        bins = groups[:2]
        bins.sub_(bins.amax(1, keepdim=True)).exp_()
        scale[searched] = self._add_up(bins[searched], scratch)
        torch.sum(bins[1 - searched], 0, out=scale[1 - searched])
        torch.div(self.rest, scale, out=scale)
        torch.addcmul(scratch.offsets, scratch.inner_sums, scale[searched], out=scratch.knots)
        torch.ge(x, scratch.knots, out=scratch.inner_masks)
        torch.sum(scratch.inner_masks, 0, out=found[10])
        torch.sub(scratch.masks[:-1], scratch.before, out=scratch.chosen)
        torch.sum(torch.mul(groups, scratch.chosen, out=scratch.products), 1, out=found[1:4])
        torch.sum(torch.mul(bins, scratch.before, out=scratch.of_bins), 1, out=found[4:6])
        few = torch.mul(groups[2, :-1], scratch.not_first, out=scratch.of_slopes)
        torch.sum(few, 0, out=found[0])

    def value(self, x: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log-slope of x `(n)`, of which all blocks are located; completes `found`."""
        y, log_slope = torch.empty_like(x), torch.empty_like(x)
        for at in _slices(x, LONG_BLOCK):
            self._value(x[at], found[:, at], y[at], log_slope[at])
        return y, log_slope

    def _value(self, x: Tensor, found: Tensor, y: Tensor, log_slope: Tensor) -> None:
        slopes, size, lower, scale, sigmoids, (place, between, inside) = _rows(found)
        slopes.add_(SLOPE_SHIFT)
        torch.sigmoid(slopes, out=sigmoids)
        slopes.copy_(F.softplus(slopes)).add_(MIN_SLOPE)
        size.mul_(scale).add_(self.least)
        lower.mul_(scale).add_(self._offset(place))
        z, i = x.clamp(-self.bound, self.bound), 1 if self.inverse else 0
        _between(z, lower[i], size[i], between)
        if self.inverse:
            value, slope, place_of_value = backwards(between, lower, size, slopes)
            between.copy_(place_of_value)
        else:
            value, slope = forwards(between, lower, size, slopes)
        torch.lt(x.abs(), self.bound, out=inside)
        torch.addcmul(F.hardshrink(x, self._below_bound), value, inside, out=y)
        torch.log(slope, out=log_slope).mul_(inside)

    def gradient(self, found: Tensor, by_y: Tensor, by_log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """By x `(n)`, and by the bin `(NUM_BY, n)`."""
        by_x, by = torch.empty_like(by_y), by_y.new_empty(self.NUM_BY, by_y.shape[0])
        for at in _slices(by_y, LONG_BLOCK):
            block = found[:, at], by_y[at], by_log_slope[at]
            self._gradient(*block, by_x[at], by[:, at])
        return by_x, by

    def _gradient(
        self, found: Tensor, by_y: Tensor, by_log_slope: Tensor, by_x: Tensor, by: Tensor
    ) -> None:
        slopes, size, lower, scale, sigmoids, (place, between, inside) = _rows(found)
        by_value, by_log_slope = by_y * inside, by_log_slope * inside
        by_argument, by_lower, by_size, by_slopes = gradient(
            between, size, slopes, by_value, by_log_slope, self.inverse
        )
        torch.add(by_argument, by_y, out=by_x).sub_(by_value)
        # With p the softmax, x0 = offset + rest Σ_{j<k} p_j and w = least + rest p_k. A gradient a_j by p_j is
        # p_j (a_j - Σ_i p_i a_i) by its argument; here a_j = rest ([j < k] by_lower + [j = k] by_size).
        mean = torch.mul(by_lower, lower - self._offset(place), out=by[6:])
        mean.addcmul_(by_size, size - self.least).mul_(scale).mul_(-1 / self.rest)
        torch.mul(by_slopes, sigmoids, out=by[0:4:3])
        torch.mul(by_size, scale, out=by[1:3])
        torch.mul(by_lower, scale, out=by[4:6])

    def spread(self, raw: Tensor, found: Tensor, by: Tensor, out: Tensor) -> None:
        """Into `out` `(3K, n)`, the gradient by the parameters that `locate` was given as `raw`; the last row is undefined."""
        scratch, place = self._buffers(raw.shape[1]), found[10]
        torch.gt(place, scratch.numbers, out=scratch.before)
        chosen = torch.eq(place, scratch.numbers, out=scratch.chosen)
        shape = (3, self.num_bins, -1)
        of_bins, of_slopes = out.view(shape)[:2], out.view(shape)[2, :-1]
        torch.addcmul(by[6:].unsqueeze(1), scratch.before, by[4:6].unsqueeze(1), out=of_bins)
        of_bins.addcmul_(chosen, by[1:3].unsqueeze(1)).mul_(raw.view(shape)[:2])
        torch.mul(scratch.not_last, by[3], out=of_slopes).addcmul_(scratch.not_first, by[0])

    def _buffers(self, n: int) -> _Scratch:
        if self._scratch is None or self._scratch.masks.shape[1] != n:
            K = self.num_bins
            numbers = torch.arange(K, dtype=self.like.dtype, device=self.like.device).unsqueeze(1)
            masks, chosen, products = self.like.new_empty(5 * K + 1, n).split([K + 1, K, 3 * K])
            masks[0] = 1
            masks[K] = 0
            self._scratch = _Scratch(
                masks, masks[1:K], masks[1:],
                chosen, chosen[1:], chosen[:-1],
                products.view(3, K, n), products[: 2 * K].view(2, K, n), products[: K - 1],
                products[:K].unbind(), products[: K - 1], chosen[: K - 1],
                numbers, self._offset(numbers[1:]),
            )  # fmt: skip
        return self._scratch

    def _add_up(self, parts: Tensor, scratch: _Scratch) -> Tensor:
        """Writes the sums of the first 1, ..., K parts, and returns the last."""
        sums = scratch.sums
        if parts.device.type != "cpu":
            torch.cumsum(parts, 0, out=scratch.products[0])
            return sums[-1]
        # Four times as fast as cumsum, which runs along each column.
        first, *others = parts.unbind()
        sums[0].copy_(first)
        for before, part, out in zip(sums, others, sums[1:], strict=False):
            torch.add(before, part, out=out)
        return sums[-1]

    def _offset(self, place: Tensor) -> Tensor:
        """The knot of this number, less what the softmax adds."""
        return (place * self.least).sub_(self.bound)


def _rows(found: Tensor) -> tuple[Any, ...]:
    """Slopes, sizes, lower corners, scales and derivatives of slopes `(2, n)`; three more rows."""
    return found[0:4:3], found[1:3], found[4:6], found[6:8], found[8:10], found[10:].unbind()


def _between(z: Tensor, lower: Tensor, size: Tensor, out: Tensor) -> Tensor:
    """The place of z between the ends of its bin, from 0 to 1 under any rounding."""
    return torch.sub(z, lower, out=out).div_(size).clamp_(0, 1)


def _slices(x: Tensor, size: int) -> Iterator[slice]:
    """Slices of x `(n, *)` of that size on a CPU, all of it elsewhere."""
    n = len(x)
    size = max(1, size) if x.device.type == "cpu" else max(1, n)
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def scale_bins(source: Tensor, target: Tensor, num_bins: int) -> Tensor:
    """Raw parameters `(3K - 1, *)`, or gradients by them, into `target` as `Spline` takes and returns them."""
    torch.mul(source[: 2 * num_bins], BIN_SCALE, out=target[: 2 * num_bins])
    if target is not source:
        target[2 * num_bins :] = source[2 * num_bins :]
    return target


def fused_rq_spline(
    x: Tensor, raw: Tensor, num_bins: int, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`ops.rq_spline` of x `(*)` and raw `(*, 3K - 1)`, whose leading dimensions are the same."""
    shape = x.shape
    if x.dim() == 1:
        x, raw = x.unsqueeze(-1), raw.unsqueeze(-2)
    elif x.dim() > 2:
        x, raw = x.flatten(0, -2), raw.flatten(0, -3)
    settings = num_bins, float(bound), inverse
    if needs_graph(x, raw):
        y, ladj = _FusedSpline.apply(settings, x, raw)
    else:
        y, ladj = _run(Spline(*settings, x), x, raw)[:2]
    return y.reshape(shape), ladj.reshape(shape)


def _run(spline: Spline, x: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
    """Value and log-slope of x `(R, N)` with raw `(R, N, 3K - 1)`; every element's bin, and the parameters by blocks."""
    K, N = spline.num_bins, x.shape[1]
    flat = x.flatten()
    found = x.new_empty(spline.NUM_FOUND, len(flat))
    kept = []
    for rows in _slices(x, BLOCK // N):
        source = raw[rows].movedim(-1, 0)
        block = raw.new_empty(3 * K, source[0].numel())
        scale_bins(source, block[:-1].view(source.shape), K)
        at = slice(rows.start * N, rows.stop * N)
        spline.locate(flat[at], block, found[:, at])
        kept.append(block)
    y, log_slope = spline.value(flat, found)
    return y.view(x.shape), log_slope.view(x.shape), found, *kept


class _FusedSpline(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: tuple[int, float, bool], x: Tensor, raw: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, ladj, found, *kept = _run(Spline(*settings, x), x, raw)
        ctx.settings = settings
        ctx.save_for_backward(x, raw, found, *kept)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, by_y: Tensor, by_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, raw, found, *kept = ctx.saved_tensors
        if not may_write_gradient(by_y, by_ladj):
            from .splines import by_autograd  # which imports this module

            def run(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
                return by_autograd(x, raw, *ctx.settings)

            return None, *plain_gradient(run, (x, raw), ctx.needs_input_grad[1:], (by_y, by_ladj))
        K, bound, inverse = ctx.settings
        spline, N = Spline(K, bound, inverse, x), x.shape[1]
        by_x, by = spline.gradient(found, by_y.flatten(), by_ladj.flatten())
        by_raw = torch.empty_like(raw)
        for rows, block in zip(_slices(x, BLOCK // N), kept, strict=True):
            at, out = slice(rows.start * N, rows.stop * N), torch.empty_like(block)
            spline.spread(block, found[:, at], by[:, at], out)
            target = by_raw[rows].movedim(-1, 0)
            scale_bins(out[:-1].view(target.shape), target, K)
        return None, by_x.view(x.shape), by_raw
