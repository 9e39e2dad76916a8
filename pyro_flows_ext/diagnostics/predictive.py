"""How well does a density predict data that it has not seen? PIT calibration and CRPS, column by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..distributions import Density
from ..infer.density.arrays import as_tensor
from ..ops import check_positive
from .calibration import CalibrationResult, rank_among

# Numbers drawn at a time.
CHUNK = 4_000_000


def pit(
    density: Density,
    data: Any,
    context: Any = None,
    *,
    num_draws: int = 99,
    columns: Sequence[str] | None = None,
) -> CalibrationResult:
    """Calibration by the probability integral transform: ranks of data among draws of the density.

    For each row y_n and column d, the rank of y_nd among `num_draws` draws of p(y_d | x_n), which is uniform where the
    density is right. `rank_histogram(result)` is the picture, `print(result)` the verdict. The ranks are of one column at
    a time: they show nothing of the dependence between columns.

    Args:
        density: of vectors or images; for one with `context_dim`, its context is given at each row.
        data: rows `(N, *event_shape)` that it was not trained on: a tensor, an array or a DataFrame.
        context: `(N, C)`.
        num_draws: draws a row, so that ranks go from 0 to this.
        columns: names of the numbers of a row; by default those of a DataFrame.

    Raises:
        ValueError: rows or contexts do not fit the density.

    Example:
        >>> result = pit(pf.flows.NSF(2).eval(), torch.randn(200, 2))
        >>> list(result.ranks)
        ['[0]', '[1]']

    References:
        Dawid 1984, Present Position and Potential Developments: Statistical Theory, the Prequential Approach; Gneiting,
        Balabdaoui & Raftery 2007, Probabilistic Forecasts, Calibration and Sharpness.
    """
    values, contexts, named = _read(density, data, context)
    ranks = [
        rank_among(part, draws)
        for part, draws in _drawn(density, values, contexts, check_positive("num_draws", num_draws))
    ]
    table = torch.cat(ranks).flatten(1).cpu().numpy()
    names = columns or named or _numbered(values)
    if len(names) != table.shape[1]:
        raise ValueError(f"columns: expected {table.shape[1]} names, got {len(names)}")
    return CalibrationResult({name: table[:, i] for i, name in enumerate(names)}, num_draws)


def crps(density: Density, data: Any, context: Any = None, *, num_draws: int = 500) -> Tensor:
    """Continuous ranked probability score of every number: E|X - y| - E|X - X'| / 2 for X, X' ~ p(· | x_n), unbiased.

    In the units of the column; lower is better, and the absolute error where the density is a point. Its mean over rows
    is lowest in expectation for the density that the data come from.

    Args:
        density, data, context: as in `pit`.
        num_draws: draws a row, at least 2.

    Returns:
        A tensor `(N, *event_shape)`.

    Raises:
        ValueError: rows or contexts do not fit the density, or `num_draws` is less than 2.

    Example:
        >>> crps(pf.flows.NSF(2).eval(), torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    References:
        Gneiting & Raftery 2007, Strictly Proper Scoring Rules, Prediction, and Estimation, section 4.2.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws: expected at least 2, got {num_draws!r}")
    values, contexts, _ = _read(density, data, context)
    m = check_positive("num_draws", num_draws)
    scores = []
    for part, draws in _drawn(density, values, contexts, m):
        # Over sorted draws, Σ_{i<j} |x_j - x_i| = Σ_i (2 i - m - 1) x_(i).
        weights = 2 * torch.arange(1, m + 1, dtype=draws.dtype, device=draws.device) - m - 1
        spread = torch.einsum("i,i...->...", weights, draws.sort(0).values) / (m * (m - 1))
        scores.append((draws - part).abs().mean(0) - spread)
    return torch.cat(scores)


def _read(
    density: Density, data: Any, context: Any
) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """Rows and contexts on the device of the density, and the names of the columns."""
    values, columns = as_tensor("data", data)
    like = next(density.parameters(), torch.empty(0))
    values = values.to(like)
    event = tuple(density.event_shape)
    if values.dim() == 1 and event == (1,):
        values = values.unsqueeze(-1)
    if values.dim() != len(event) + 1 or tuple(values.shape[1:]) != event or not len(values):
        raise ValueError(
            f"data: expected rows ({', '.join(['N', *map(str, event)])}), got {tuple(values.shape)}"
        )
    if not density.context_dim:
        if context is not None:
            raise ValueError("context: expected none for a density without context_dim")
        return values, None, columns
    if context is None:
        raise ValueError(f"context: expected one of shape ({len(values)}, {density.context_dim})")
    contexts = as_tensor("context", context)[0].to(like)
    contexts = contexts.unsqueeze(-1) if contexts.dim() == 1 else contexts
    if tuple(contexts.shape) != (len(values), density.context_dim):
        raise ValueError(
            f"context: expected shape ({len(values)}, {density.context_dim}), got {tuple(contexts.shape)}"
        )
    return values, contexts, columns


@torch.no_grad()
def _drawn(
    density: Density, values: Tensor, contexts: Tensor | None, num: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, and draws `(num, rows, *event_shape)` at each of them."""
    density.eval()
    size = max(1, CHUNK // (num * values[0].numel()))
    for start in range(0, len(values), size):
        rows = values[start : start + size]
        at: Any = density
        at = (
            at.expand((len(rows),))
            if contexts is None
            else at.condition(contexts[start : start + size])
        )
        yield rows, at.sample((num,))


def _numbered(values: Tensor) -> list[str]:
    return [f"[{','.join(map(str, index))}]" for index in product(*map(range, values.shape[1:]))]
