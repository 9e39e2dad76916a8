"""Rows to train on and to validate with, checked against a density, and its units set by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from .checks import (
    check_rows,
    initialize,
    moments_of,
    objective,
    standardize,
    warn_of_discrete,
)
from .rows import Rows, Table, read_rows, split_rows
from .settings import trained


def read(
    name: str, density: Density, data: Any, context: Any, weights: Any, batch_size: int
) -> Rows:
    """Data as rows that fit the density. Raises `TypeError` or `ValueError` for others, NaN and infinite values."""
    rows = read_rows(name, data, context, weights, density.context_dim > 0, batch_size)
    like = trained(density)[0]
    density.eval()
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        check_shapes(name, density, rows, like)
    check_rows(name, rows, like.dtype)
    return rows


def split(
    density: Density, rows: Rows, validation: Any, batch_size: int
) -> tuple[Rows, Rows | None]:
    """Rows to train on and to validate with."""
    if validation is None:
        return rows, None
    if isinstance(validation, int | float):
        if isinstance(validation, bool) or not 0 <= validation < 1:
            raise ValueError(f"validation: expected a share in [0, 1), got {validation!r}")
        return split_rows(rows, validation, batch_size) if validation else (rows, None)
    parts = validation if isinstance(validation, tuple) else (validation,)
    values, context, weights = (*parts, None, None)[:3]
    return rows, read("validation", density, values, context, weights, batch_size)


def set_units(density: Density, train: Rows, how: bool | str) -> None:
    """Sets the units of the density, and starts its ActNorms, by the rows that it trains on."""
    moments = moments_of(train)
    context = moments_of(train, "context") if density.context_dim else None
    warn_of_discrete("data", density, train, moments)
    standardize(density, train, moments, how, context)
    initialize(density, train)


@torch.no_grad()
def check_shapes(name: str, density: Density, rows: Rows, like: Tensor) -> None:
    """Raises `ValueError` for rows and contexts that do not fit the density; numbers `(N)` become rows `(N, 1)`."""
    context_dim = density.context_dim
    first = rows.head(1)
    if first.context is None:
        if context_dim:
            raise ValueError(
                f"{name}: expected a context {(len(first.values), context_dim)} beside the rows, as this density depends on one"
            )
        at: Density = density
    else:
        if not context_dim:
            raise ValueError(f"{name}: expected no context for a density without context_dim")
        if first.context.shape[1:] != (context_dim,):
            got = tuple(first.context.shape[1:])
            raise ValueError(
                f"{name} context: expected shape (N, {context_dim}), got (N, {', '.join(map(str, got))})"
            )
        at = density.condition(first.context[:1].to(like))
    if isinstance(rows, Table) and first.values.dim() == 1 and at.event_shape == (1,):
        rows.unsqueeze()
        first = rows.head(1)
    shape = tuple(first.values.shape[1:])
    if shape != tuple(at.event_shape) or at.batch_shape not in ((), (1,)):
        expected = ", ".join(["N", *map(str, at.event_shape)])
        batch = (
            f" and batch shape (), got {tuple(at.batch_shape)}"
            if at.batch_shape not in ((), (1,))
            else ""
        )
        raise ValueError(
            f"{name}: expected rows ({expected}){batch}, got ({', '.join(['N', *map(str, shape)])})"
        )
    one = first.take(slice(1)).to(like)
    if one.values.isfinite().all():
        scored = objective(density, one).shape
        if scored != (1,):
            raise ValueError(
                f"{name}: expected one log_prob for each row, got shape {tuple(scored)} for one row"
            )
