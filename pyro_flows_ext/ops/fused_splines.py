"""Rational-quadratic splines as one operation: block of rows by block of rows, with the gradient in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .fused import may_write_gradient, needs_graph, plain_gradient
from .rational_quadratic import (
    BIN_SCALE,
    MIN_BIN,
    SLOPE_SHIFT,
    backwards,
    end_slopes,
    forwards,
    gradient,
    log_slope_gradient,
)

# Elements at a time on a CPU. Fewer would stay in a smaller cache, but then the cost of a call to torch shows.
BLOCK = 16384


def fused_rq_spline(
    x: Tensor, raw: Tensor, num_bins: int, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`ops.rq_spline` of x `(*)` and raw `(*, 3K - 1)`, whose leading dimensions are the same."""
    shape = x.shape
    if x.dim() == 1:
        x, raw = x.unsqueeze(-1), raw.unsqueeze(-2)
    elif x.dim() > 2:
        x, raw = x.flatten(0, -2), raw.flatten(0, -3)
    spline = _Spline(num_bins, float(bound), inverse)
    if needs_graph(x, raw):
        y, ladj = _FusedSpline.apply(spline, x, raw)
    else:
        y, ladj = spline.run(x, raw)[:2]
    return y.reshape(shape), ladj.reshape(shape)


class _Spline:
    """The passes over x `(R, N)` and raw `(R, N, 3K - 1)`, by blocks of n elements with the bins first."""

    def __init__(self, num_bins: int, bound: float, inverse: bool):
        self.num_bins, self.bound, self.inverse = num_bins, bound, inverse
        # A bin takes `least` of the box, and its part of `rest`.
        self.least = 2 * bound * MIN_BIN
        self.rest = 2 * bound - num_bins * self.least

    def run(self, x: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        """Value and log-slope, and what the gradient takes of every block."""
        y, ladj = torch.empty_like(x), torch.empty_like(x)
        found = []
        for rows in self._blocks(x):
            block = x[rows]
            z = block.clamp(-self.bound, self.bound).flatten()
            corners, raw_ends, *others = self._find(z, raw[rows].movedim(-1, 0))
            run = backwards if self.inverse else forwards
            value, slope = run(z, corners, end_slopes(raw_ends))
            inside = block.abs() < self.bound
            torch.where(inside, value.view_as(block), block, out=y[rows])
            torch.where(inside, slope.log_().view_as(block), block.new_zeros(()), out=ladj[rows])
            found += [corners, raw_ends, *others]
        return y, ladj, *found

    def _blocks(self, x: Tensor) -> Iterator[slice]:
        rows, size = x.shape[0], x.shape[0]
        if x.device.type == "cpu":
            size = max(1, BLOCK // x.shape[1])
        for start in range(0, rows, size):
            yield slice(start, min(rows, start + size))

    def _parts(self, raw: Tensor, least: Tensor) -> Tensor:
        """exp of the raw widths and heights less their maximum: `(2, K, n)`."""
        bins = raw[: 2 * self.num_bins]
        out = torch.empty(bins.shape, dtype=raw.dtype, device=raw.device)
        least = least.reshape(2, 1, *raw.shape[1:])
        shape = (2, self.num_bins)
        torch.add(least, bins.unflatten(0, shape), alpha=BIN_SCALE, out=out.unflatten(0, shape))
        return out.exp_().view(*shape, -1)

    def _find(self, z: Tensor, raw: Tensor) -> tuple[Tensor, ...]:
        """The bins of z `(n)`: corners `(2, 2, n)`, raw slopes at and numbers of both ends `(2, n)`, and of the softmax
        minus the maxima and the sums `(2, n)`."""
        K = self.num_bins
        least = raw[: 2 * K].unflatten(0, (2, K)).amax(1).mul_(-BIN_SCALE)
        # Sums of the first 0, ..., K parts, by one product with a triangle of ones.
        triangle = torch.ones(K + 1, K, dtype=raw.dtype, device=raw.device).tril_(-1)
        sums = torch.bmm(triangle.expand(2, K + 1, K), self._parts(raw, least))
        total = sums[:, K]
        scale = self.rest / total
        searched = 1 if self.inverse else 0
        offsets = self._offsets(torch.arange(1, K, dtype=raw.dtype, device=raw.device))
        inner = torch.addcmul(offsets.unsqueeze(1), sums[searched, 1:K], scale[searched])
        # Comparisons as numbers: sums of booleans take three times as long.
        place = torch.ge(z, inner, out=torch.empty_like(inner)).sum(0)
        places = torch.stack([place, place + 1])
        ends = places.long()
        corners = sums.gather(1, ends.expand(2, *ends.shape))
        corners = torch.addcmul(self._offsets(places), corners, scale.unsqueeze(1))
        # Exactly at the bound, whatever the sums round to.
        corners[:, 1].masked_fill_(ends[1] == K, self.bound)
        raw_slopes = raw.new_zeros(K + 1, len(z))
        raw_slopes[1:K].view(K - 1, *raw.shape[1:]).copy_(raw[2 * K :])
        return corners, raw_slopes.gather(0, ends), ends, least.reshape(2, -1), total.contiguous()

    def _offsets(self, places: Tensor) -> Tensor:
        """The j-th knot, less what the softmax adds."""
        return (places * self.least).sub_(self.bound)

    def gradient(
        self,
        x: Tensor,
        raw: Tensor,
        y: Tensor,
        found: Sequence[Tensor],
        by_y: Tensor,
        by_ladj: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """By x `(R, N)` and by raw `(R, N, 3K - 1)`."""
        by_x, by_raw = torch.empty_like(x), torch.empty_like(raw)
        for i, rows in enumerate(self._blocks(x)):
            corners, raw_ends, *others = found[5 * i : 5 * i + 5]
            block = x[rows]
            inside = block.abs() < self.bound
            by_value = torch.where(inside, by_y[rows], 0.0).flatten()
            by_log_slope = torch.where(inside, by_ladj[rows], 0.0).flatten()
            slopes = end_slopes(raw_ends)
            if self.inverse:
                z = y[rows].clamp(-self.bound, self.bound).flatten()
                # With x = g⁻¹(y; θ): dx = (dy - ∂g/∂θ dθ) / g', and the log-slope is -log g'(x; θ).
                curvature = log_slope_gradient(z, corners, slopes)
                by_argument = torch.addcmul(by_value, by_log_slope, curvature, value=-1)
                by_argument /= forwards(z, corners, slopes)[1]
                _, lower, size, by_slopes = gradient(
                    z, corners, slopes, -by_argument, -by_log_slope
                )
            else:
                z = block.clamp(-self.bound, self.bound).flatten()
                by_argument, lower, size, by_slopes = gradient(
                    z, corners, slopes, by_value, by_log_slope
                )
            torch.where(inside, by_argument.view_as(block), by_y[rows], out=by_x[rows])
            by_slopes.mul_((raw_ends + SLOPE_SHIFT).sigmoid_())
            out = by_raw[rows].movedim(-1, 0)
            self._write(out, raw[rows].movedim(-1, 0), corners, others, lower, size, by_slopes)
        return by_x, by_raw

    def _write(
        self,
        out: Tensor,
        raw: Tensor,
        corners: Tensor,
        others: Sequence[Tensor],
        by_lower: Tensor,
        by_size: Tensor,
        by_slopes: Tensor,
    ) -> None:
        """Gradients by the raw parameters of all bins, from those by the corner, the size and the slopes of one."""
        K = self.num_bins
        ends, least, total = others
        place = ends[0]
        places = place.to(raw.dtype)
        # With p the softmax, x0 = offset + rest Σ_{j<k} p_j and w = least + rest p_k. A gradient a_j by p_j is
        # p_j (a_j - Σ_i p_i a_i) by its argument; here a_j = rest ([j < k] by_lower + [j = k] by_size).
        bottom, top = corners.unbind(1)
        mean = by_lower * (bottom - self._offsets(places))
        mean.addcmul_(by_size, top - bottom - self.least).mul_(-1 / self.rest)
        factor = (BIN_SCALE * self.rest) / total
        numbers = torch.arange(K, dtype=raw.dtype, device=raw.device).unsqueeze(1)
        before = (places - numbers).clamp_(0, 1)
        by_parts = torch.addcmul(
            (mean * factor).unsqueeze(1), before, (by_lower * factor).unsqueeze(1)
        )
        by_parts.scatter_add_(1, place.expand(2, 1, -1), (by_size * factor).unsqueeze(1))
        by_parts = by_parts.view(2 * K, *raw.shape[1:])
        torch.mul(by_parts, self._parts(raw, least).view_as(by_parts), out=out[: 2 * K])
        by_ends = raw.new_zeros(K + 1, len(place)).scatter_(0, ends, by_slopes)
        out[2 * K :] = by_ends[1:K].view(K - 1, *raw.shape[1:])


class _FusedSpline(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spline: _Spline, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj, *found = spline.run(x, raw)
        ctx.spline = spline
        ctx.save_for_backward(x, raw, y, *found)
        return y, ladj

    @staticmethod
    def backward(ctx: Any, by_y: Tensor, by_ladj: Tensor) -> tuple[Tensor | None, ...]:
        x, raw, y, *found = ctx.saved_tensors
        if may_write_gradient(by_y, by_ladj):
            return None, *ctx.spline.gradient(x, raw, y, found, by_y, by_ladj)
        from .splines import by_autograd  # which imports this module

        spline = ctx.spline

        def run(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
            return by_autograd(x, raw, spline.num_bins, spline.bound, spline.inverse)

        return None, *plain_gradient(run, (x, raw), ctx.needs_input_grad[1:], (by_y, by_ladj))
