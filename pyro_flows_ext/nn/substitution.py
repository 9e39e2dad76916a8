"""Forward substitution through a masked network: every unit is computed once, as soon as its inputs are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Variables whose units get all that lies before them by one product a layer. More variables leave longer products to the
# steps of single variables, fewer variables make more and smaller products.
BLOCK = 16

Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def substitute(
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    begins: Sequence[Sequence[int]],
    activation: Callable[[Tensor], Tensor],
    solve: Solve,
    *,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the x with x_k = solve(y_k, θ_k), θ_k = net(x_0, ..., x_{k-1})_k, and the sum of the log-slopes.

    The batch is the last dimension, so that a variable or a unit is one contiguous row. Cost: the products of half a pass of
    the network, and D calls of `solve`. There is no graph.

    Args:
        y: `(D, R)`, in the order in which the variables depend on one another.
        weights: by layer `(out, in)`, with units in the order in which they become known.
        biases: by layer `(out, 1)` or `(out, R)`.
        begins: for the input and every layer, how many of its units are known before step 0, 1, ..., D, in which
            x_0, x_1, ... are found: `(D + 1)`. A unit of step k depends on those of the layer before up to step k.
        activation: elementwise; may overwrite its argument.
        solve: y `(R)`, θ `(P, R)` -> x `(R)` and a log-slope `(R)`.
        residual: whether a hidden layer as wide as the one before it is added to it.
    """
    (dim, rows), last = y.shape, len(weights) - 1
    x, total = torch.empty_like(y), y.new_zeros(rows)
    units = [x, *(y.new_empty(len(weight), rows) for weight in weights)]
    adds = [residual and 0 < i < last and len(units[i]) == len(units[i + 1]) for i in range(last)]
    for start in range(0, dim, BLOCK):
        stop = min(start + BLOCK, dim)
        known = [begin[start] for begin in begins]
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            part, seen = slice(known[i + 1], begins[i + 1][stop]), known[i]
            torch.addmm(bias[part], weight[part, :seen], units[i][:seen], out=units[i + 1][part])
        for k in range(start, stop):
            for i, weight in enumerate(weights):
                part, seen = slice(begins[i + 1][k], begins[i + 1][k + 1]), begins[i][k + 1]
                out = units[i + 1][part]
                if not len(out):
                    continue
                if seen > known[i]:
                    out.addmm_(weight[part, known[i] : seen], units[i][known[i] : seen])
                if i < last:
                    value = activation(out)
                    if adds[i]:
                        value = value.add_(units[i][part])
                    if value is not out:
                        out.copy_(value)
            x[k], log_slope = solve(y[k], out)
            total += log_slope
    return x, total
