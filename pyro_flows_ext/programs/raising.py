"""Particles for which a model raises: they have density zero, and the rest of their batch is evaluated without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Errors of a model at values that it does not accept; in a batched run, also that it does not run in this way.
ERRORS = (RuntimeError, ValueError, IndexError, NotImplementedError, ArithmeticError)
# A batch in which more than this share raises is an error of the model; smaller batches are single trials of an optimiser.
MAX_RAISED, LEAST_BATCH = 0.5, 8


class NaNForFailures(TorchFunctionMode):
    """Has factorizations and solves that fail return NaN for the failing matrices, where torch raises for a whole batch.

    A sampler visits such particles often, and to find them by halving a batch takes a dozen runs of the model each.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.linalg.cholesky, torch.cholesky, Tensor.cholesky) and not kwargs:
            factor, info = torch.linalg.cholesky_ex(args[0])
            return _nan_where_failed(factor, info) if len(args) == 1 else func(*args)
        if func in (torch.linalg.inv, torch.inverse, Tensor.inverse) and not kwargs:
            return _nan_where_failed(*torch.linalg.inv_ex(args[0]))
        return func(*args, **kwargs)


def _nan_where_failed(result: Tensor, info: Tensor) -> Tensor:
    return torch.where((info == 0)[..., None, None], result, torch.nan)


def guarded(evaluate: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, int]:
    """`evaluate(rows)` with -inf for rows that raise, and their number.

    Raises `ValueError` where most rows of a batch raise.
    """
    try:
        return evaluate(rows), 0
    except ERRORS as error:
        first = error
    raised: list[int] = []
    limit = MAX_RAISED * len(rows) if len(rows) >= LEAST_BATCH else len(rows)
    found = _bisect(evaluate, rows, 0, raised, limit)
    if len(raised) > limit:
        where = ""
        if rows.is_floating_point():
            values = ", ".join(f"{v:.4g}" for v in rows[raised[0]].tolist()[:8])
            where = f", first at the unconstrained latents [{values}]"
        raise ValueError(
            f"the model raised {type(first).__name__} for more than half of {len(rows)} particles{where}: "
            f"{first_line(first)}"
        ) from first
    return found, len(raised)


def _bisect(
    evaluate: Callable[[Tensor], Tensor],
    rows: Tensor,
    start: int,
    raised: list[int],
    limit: float,
) -> Tensor:
    """The values of rows in halves, down to those that raise."""
    if len(raised) <= limit:
        try:
            return evaluate(rows)
        except ERRORS:
            if len(rows) == 1:
                raised.append(start)
    if len(rows) == 1 or len(raised) > limit:
        dtype = rows.dtype if rows.is_floating_point() else torch.get_default_dtype()
        return torch.full((len(rows),), -torch.inf, dtype=dtype, device=rows.device)
    half = len(rows) // 2
    left = _bisect(evaluate, rows[:half], start, raised, limit)
    return torch.cat([left, _bisect(evaluate, rows[half:], start + half, raised, limit)])


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
