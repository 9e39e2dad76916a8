"""`fit_density`: maximum likelihood in mini-batches, with the parameters kept that were best on other data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from .._loop import OptimFactory, check_settings, decay, seeded, warn_of_skipped
from ..training import checkpoint as files
from .checks import check_rows, initialize, objective, standardize, warn_of_discrete
from .rows import Rows, Table, read_rows, split_rows
from .run import DensityTrainingState, Run, Settings, trained


@dataclass(frozen=True)
class DensityFitResult:
    """The outcome of `fit_density`. All losses are in nats a row, in the units of the data.

    Attributes:
        losses: of every step on its batch, before its update; NaN where it was skipped.
        validation_steps, validation_losses: of every evaluation, the first before any step; empty without such data.
        best_step: the step whose parameters the density has now.
        best_loss: the validation loss there; NaN without validation data.
        stopped_early: whether patience, a callback or Ctrl-C ended the run.
        interrupted: whether it was a callback or Ctrl-C.
        steps, skipped_steps: how many were taken, and how many of these changed nothing.
        seconds: of steps and evaluations.
        density: the density, in eval mode.
        first_steps: steps of the part that trains first.
        columns, context_columns: names of the columns of DataFrames, or None.
    """

    losses: Tensor
    validation_steps: Tensor
    validation_losses: Tensor
    best_step: int
    best_loss: float
    stopped_early: bool
    steps: int
    skipped_steps: int
    seconds: float
    density: Density = field(repr=False)
    first_steps: int = 0
    interrupted: bool = False
    columns: list[str] | None = None
    context_columns: list[str] | None = None


def fit_density(
    density: Density,
    data: Any,
    context: Any = None,
    *,
    weights: Any = None,
    validation: Any = 0.1,
    standardize: bool | str = "auto",
    batch_size: int = 256,
    num_steps: int = 2000,
    lr: float = 3e-3,
    optim: OptimFactory | None = None,
    schedule: str = "cosine",
    final_lr: float = 0.01,
    clip_norm: float | None = 5.0,
    evaluate_every: int | None = None,
    patience: int | None = 10,
    first_steps: int | None = None,
    callback: Callable[[DensityTrainingState], Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> DensityFitResult:
    """Trains a density on rows of data by maximum likelihood, or by its bound: minimises -mean `objective(row)`.

    Args:
        density: trained in place; in eval mode afterwards, with the parameters that were best on the validation rows.
        data: rows `(N, *event_shape)`: a tensor, array (also memory-mapped), DataFrame, Dataset, or a DataLoader or other
            iterable of batches.
        context: for a density with `context_dim`, `(N, C)`; datasets and loaders return pairs (row, context).
        weights: `(N)`, the weight of each row in the loss.
        validation: the share of rows to hold out, rows, a pair (rows, context), a dataset or loader, or None.
        standardize: whether `density.standardize` gets the moments of the data, and its context those of `context`;
            "auto": where scales are far from 1 or differ by more than 1000.
        batch_size, num_steps, lr, schedule, final_lr: the rate falls from `lr` to `final_lr * lr`.
        optim: makes another optimizer than Adam from the parameters.
        clip_norm: the largest joint norm of the gradients.
        evaluate_every: steps between evaluations; None for a fiftieth of the run.
        patience: evaluations in a row without a better one that end the run; None for never.
        first_steps: steps that hold the part `trained_later` of a density; None for half of them where there is one.
        callback: is called with the `DensityTrainingState` after every evaluation.
        seed: makes the run reproducible, and leaves the global generators as they were.
        checkpoint, resume: a file written every few seconds and at the end; with `resume=True` an existing one is
            continued, to the same losses.

    Returns:
        A `DensityFitResult`; also after Ctrl-C, with the best state so far.

    Raises:
        TypeError: for what is no `Density`, and data of another kind.
        ValueError: for arguments out of range, NaN and infinite values, and rows that do not fit.
        FloatingPointError: after 100 steps in a row, or all evaluations, without a finite loss.
    """
    counts = {"num_steps": num_steps, "batch_size": batch_size, "evaluate_every": evaluate_every, "patience": patience}  # fmt: skip
    check_settings(lr, schedule, **{k: n for k, n in counts.items() if n is not None})
    later = _later(_check_density(density))
    first_steps = _check_first_steps(first_steps, num_steps, bool(later))
    if standardize not in (True, False, "auto"):
        raise ValueError(f'standardize: expected True, False or "auto", got {standardize!r}')
    if resume and checkpoint is None:
        raise ValueError("resume: expected checkpoint=, the file to go on from")
    saved = _saved(checkpoint) if resume else None

    def settings(num: int) -> Settings:
        return Settings(
            num_steps=num,
            batch_size=batch_size,
            evaluate_every=max(1, num // 50) if evaluate_every is None else evaluate_every,
            patience=math.inf if patience is None else patience,
            rate=decay(schedule, num, final_lr),
            optim=optim or partial(torch.optim.Adam, lr=lr),
            clip_norm=math.inf if clip_norm is None else clip_norm,
            callback=callback,
            checkpoint=checkpoint,
            progress=progress,
        )

    with seeded(seed):
        begin = torch.get_rng_state() if saved is None else saved["begin"]
        torch.set_rng_state(begin)
        rows = read_rows("data", data, context, weights, _context_dim(density) > 0, batch_size)
        train, held_out = _split(density, rows, validation, batch_size)
        if saved is None:
            _prepare(density, train, held_out, standardize)
        # Every part draws the same order of rows, as two runs with one seed would.
        start = torch.get_rng_state() if saved is None else saved["start"]
        kept = {
            "begin": begin,
            "start": start,
            "sizes": [num_steps, first_steps, _size(train)],
            "first": None,
        }
        if saved is not None and saved["sizes"] != kept["sizes"]:
            raise ValueError(
                f"checkpoint: expected one of (num_steps, first_steps, rows) {kept['sizes']}, got {saved['sizes']}; "
                "continue with the arguments of the run that wrote it, or with resume=False"
            )
        parts: list[DensityFitResult] = []
        for is_first, num in ((True, first_steps), (False, num_steps - first_steps)):
            if not num:
                continue
            if is_first and saved is not None and saved["first"] is not None:
                parts.append(DensityFitResult(density=density, **saved["first"]))
                continue
            torch.set_rng_state(start)
            with _held(later if is_first else []):
                run = Run(density, train, held_out, settings(num), kept)
                if saved is not None:
                    run.resume(saved)
                    saved = None
                parts.append(_result(run, run.run(), rows))
            if parts[-1].interrupted:
                break
            kept["first"] = {k: v for k, v in vars(parts[-1]).items() if k != "density"}
    result = _joined(*parts) if len(parts) == 2 else parts[0]
    if first_steps and len(parts) == 1:
        result = replace(result, first_steps=result.steps)
    warn_of_skipped(result.skipped_steps, result.steps)
    return result


def _result(run: Run, interrupted: bool, rows: Rows) -> DensityFitResult:
    state = run.state
    return DensityFitResult(
        losses=torch.tensor(state.losses, dtype=torch.float64),
        validation_steps=torch.tensor(state.validation_steps, dtype=torch.int64),
        validation_losses=torch.tensor(state.validation_losses, dtype=torch.float64),
        best_step=state.step if run.validation is None else state.best_step,
        best_loss=state.best_loss,
        stopped_early=state.step < run.settings.num_steps,
        steps=state.step,
        skipped_steps=sum(not math.isfinite(value) for value in state.losses),
        seconds=run.seconds,
        density=run.density,
        interrupted=interrupted,
        columns=rows.columns,
        context_columns=rows.context_columns,
    )


def _joined(first: DensityFitResult, second: DensityFitResult) -> DensityFitResult:
    """Two runs as one. The second's evaluation before any step is of the first's best parameters, and is left out."""
    return replace(
        second,
        losses=torch.cat([first.losses, second.losses]),
        validation_steps=torch.cat(
            [first.validation_steps, first.steps + second.validation_steps[1:]]
        ),
        validation_losses=torch.cat([first.validation_losses, second.validation_losses[1:]]),
        best_step=first.steps + second.best_step if second.best_step else first.best_step,
        steps=first.steps + second.steps,
        skipped_steps=first.skipped_steps + second.skipped_steps,
        seconds=first.seconds + second.seconds,
        first_steps=first.steps,
    )


# --- data ---


def _split(
    density: Density, rows: Rows, validation: Any, batch_size: int
) -> tuple[Rows, Rows | None]:
    """Rows to train on and to validate with."""
    if validation is None:
        return rows, None
    if isinstance(validation, int | float):
        if isinstance(validation, bool) or not 0 <= validation < 1:
            raise ValueError(f"validation: expected a share in [0, 1), got {validation!r}")
        return split_rows(rows, validation, batch_size) if validation else (rows, None)
    takes_context = _context_dim(density) > 0
    parts = validation if isinstance(validation, tuple) else (validation,)
    values, context, weights = (*parts, None, None)[:3]
    return rows, read_rows("validation", values, context, weights, takes_context, batch_size)


def _prepare(density: Density, train: Rows, held_out: Rows | None, how: bool | str) -> None:
    """Checks the rows, and sets the units of the density."""
    like = trained(density)[0]
    density.eval()
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        for name, rows in (("data", train), ("validation", held_out)):
            if rows is not None:
                _check_shapes(name, density, rows, like)
    moments = check_rows("data", train, like.dtype)
    context = None
    if _context_dim(density):
        context = check_rows("context", train, like.dtype, "context")
    if held_out is not None:
        check_rows("validation", held_out, like.dtype)
        if context is not None:
            check_rows("validation context", held_out, like.dtype, "context")
    warn_of_discrete("data", density, train, moments)
    standardize(density, train, moments, how, context)
    initialize(density, train)


@torch.no_grad()
def _check_shapes(name: str, density: Density, rows: Rows, like: Tensor) -> None:
    """Raises `ValueError` for rows and contexts that do not fit the density; numbers `(N)` become rows `(N, 1)`."""
    context_dim = _context_dim(density)
    first = rows.head(1)
    if context_dim and first.context is None:
        raise ValueError(
            f"{name}: expected a context {(len(first.values), context_dim)} beside the rows, as this density depends on one"
        )
    if not context_dim and first.context is not None:
        raise ValueError(f"{name}: expected no context for a density without context_dim")
    if context_dim and first.context.shape[1:] != (context_dim,):  # type: ignore[union-attr]
        got = tuple(first.context.shape[1:])  # type: ignore[union-attr]
        raise ValueError(
            f"{name} context: expected shape (N, {context_dim}), got (N, {', '.join(map(str, got))})"
        )
    at: Any = density if not context_dim else density.condition(first.context[:1].to(like))  # type: ignore[operator, index]
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


def _size(rows: Rows) -> int | None:
    return len(rows) if isinstance(rows, Table) else None


def _saved(checkpoint: Any) -> dict[str, Any] | None:
    """The contents of an existing checkpoint."""
    if not os.path.exists(checkpoint):
        return None
    saved = files.load(checkpoint)
    if "begin" not in saved:
        raise ValueError(f"{checkpoint}: expected a checkpoint of fit_density, got one of fit")
    return saved


# --- the density ---


def _check_density(density: Any) -> Density:
    if not isinstance(density, Density):
        raise TypeError(
            f"density: expected a Density, such as FlowDistribution, got a {type(density).__name__}"
        )
    parameters = trained(density)
    if not parameters:
        raise ValueError("density: expected one with parameters to train, got none")
    dtypes = {p.dtype for p in parameters}
    if not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(
            f"density: expected parameters of float32 or float64, got {', '.join(map(str, dtypes))}; call density.float()"
        )
    if torch.is_autocast_enabled(parameters[0].device.type):
        raise ValueError(
            "torch.autocast: expected full precision, as log-determinants lose theirs in 16 bits; leave the context manager"
        )
    return density


def _context_dim(density: Density) -> int:
    return int(density.context_dim)


def _check_first_steps(first_steps: int | None, num_steps: int, has_later: bool) -> int:
    if first_steps is None:
        return num_steps // 2 if has_later else 0
    if int(first_steps) != first_steps or not 0 <= first_steps < num_steps:
        raise ValueError(
            f"first_steps: expected an integer from 0 to {num_steps - 1}, got {first_steps!r}"
        )
    if first_steps and not has_later:
        raise ValueError("first_steps: expected 0 for a density without a part to train later")
    return int(first_steps)


def _later(density: Density) -> list[Tensor]:
    """The parameters of what is `trained_later` in any part of the density; none if nothing else trains."""
    parts: Any = [p.trained_later for p in density.modules() if hasattr(p, "trained_later")]
    later = {p: None for part in parts for p in part.parameters() if p.requires_grad}
    return list(later) if len(later) < len(trained(density)) else []


@contextmanager
def _held(parameters: list[Tensor]) -> Iterator[None]:
    """Without gradients for these, which have them again afterwards."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
