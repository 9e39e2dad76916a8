"""`fit_density`: maximum likelihood in mini-batches, with the parameters kept that were best on other data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from .._loop import OptimFactory, SchedulerFactory, seeded, warn_of_skipped
from ..distributed import Processes, find_processes
from ..training import checkpoint as files
from .prepare import read, set_units, split
from .result import DensityFitResult, joined, result_of
from .rows import Rows, Table
from .run import DensityTrainingState, Run
from .settings import (
    check_arguments,
    check_density,
    check_first_steps,
    settings_of,
    trained_later,
)


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
    scheduler: SchedulerFactory | None = None,
    schedule: str = "cosine",
    final_lr: float = 0.01,
    clip_norm: float | None = 5.0,
    evaluate_every: int | None = None,
    patience: int | None = 10,
    first_steps: int | None = None,
    compile: bool | str = "auto",
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
            "auto": where a scale or a mean is off by a factor of 3, or scales differ by more than 1000.
        batch_size, num_steps, lr, schedule, final_lr: the rate falls from `lr` to `final_lr * lr`. With several processes
            (`torchrun`; docs/howto/several_processes.md), the batch is that of all together.
        optim: makes another optimizer than Adam from the parameters.
        scheduler: makes a `torch.optim.lr_scheduler` from the optimizer, in place of `schedule`; stepped after every
            update, or with the validation loss where it goes by it.
        clip_norm: the largest joint norm of the gradients.
        evaluate_every: steps between evaluations; None for a fiftieth of the run, or of each part with `first_steps`.
        patience: evaluations in a row without a better one that end the run; None for never. In steps it is `patience *
            evaluate_every`: by default a fifth of `num_steps`, as the rate, and so the progress to wait for, falls with them.
        first_steps: steps that hold the part `trained_later` of a density; None for half of them where there is one.
        compile: True compiles the loss and its gradient after the first step; "auto" where the eager steps left would take
            over five minutes, if it makes them faster. Losses are those of eager steps to rounding; see docs/compiled.md.
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
    given = dict(locals())
    check_arguments(given)
    check_density(density)
    with seeded(seed):
        result = _Plan(given).run()
    warn_of_skipped(result.skipped_steps, result.steps)
    return result


class _Plan:
    """The runs of `fit_density`: one, or the first on the parts that train first, and one on all."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = given
        self.density: Density = given["density"]
        self.later = trained_later(self.density)
        num_steps = given["num_steps"]
        self.first_steps = check_first_steps(given["first_steps"], num_steps, bool(self.later))
        saved = _saved(given["checkpoint"]) if given["resume"] else None
        begin = torch.get_rng_state() if saved is None else saved["begin"]
        torch.set_rng_state(begin)
        batch_size = given["batch_size"]
        self.processes = find_processes()
        agreed = {
            name: given[name]
            for name in ("num_steps", "batch_size", "lr", "schedule", "patience", "evaluate_every")
        }
        self.processes.start(self.density, {**agreed, "checkpoint": saved is not None})
        data, context, weights = given["data"], given["context"], given["weights"]
        self.rows = read("data", self.density, data, context, weights, batch_size)
        self.train, self.held_out = split(self.density, self.rows, given["validation"], batch_size)
        _check_parts(self.processes, batch_size, _size(self.train))
        if saved is None:
            set_units(self.density, self.train, given["standardize"])
            # Loaders may have given each process other rows.
            self.processes.copy(self.density)
        # Every part draws the same order of rows, as two runs with one seed would.
        start = torch.get_rng_state() if saved is None else saved["start"]
        sizes = [num_steps, self.first_steps, _size(self.train)]
        self.kept: dict[str, Any] = {"begin": begin, "start": start, "sizes": sizes, "first": None}
        if saved is not None and saved["sizes"] != sizes:
            raise ValueError(
                f"checkpoint: expected one of (num_steps, first_steps, rows) {sizes}, got {saved['sizes']}; "
                "continue with the arguments of the run that wrote it, or with resume=False"
            )
        self.saved = saved

    def run(self) -> DensityFitResult:
        """Runs what is left."""
        num_first, num_rest = self.first_steps, self.given["num_steps"] - self.first_steps
        if not num_first:
            return self._run(num_rest, [])
        if self.saved is not None and self.saved["first"] is not None:
            first = DensityFitResult(density=self.density, **self.saved["first"])
        else:
            first = self._run(num_first, self.later)
        if first.interrupted:
            return replace(first, first_steps=first.steps)
        self.kept["first"] = {k: v for k, v in vars(first).items() if k != "density"}
        return joined(first, self._run(num_rest, []))

    def _run(self, num_steps: int, held: list[Tensor]) -> DensityFitResult:
        torch.set_rng_state(self.kept["start"])
        settings = settings_of(self.given, num_steps)
        with _held(held):
            run = Run(self.density, self.train, self.held_out, settings, self.kept, self.processes)
            if self.saved is not None:
                run.resume(self.saved)
                self.saved = None
            return result_of(run, run.run(), self.rows)


def _check_parts(processes: Processes, batch_size: int, num_rows: int | None) -> None:
    """Raises `ValueError` where a process would get no row of a batch."""
    size = batch_size if num_rows is None else min(batch_size, num_rows)
    if size < processes.count:
        raise ValueError(
            f"batch_size: expected at least one row for each of {processes.count} processes, got batches of {size}; it is "
            "the size of the batch of all processes together"
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
