"""What `fit_density` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from .rows import Rows
from .run import Run

# Steps whose mean loss is printed where there are no validation data.
LAST_STEPS = 50


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
        compiled: whether the last steps ran compiled.
        columns, context_columns: names of the columns of DataFrames, or None.
    """

    losses: Tensor = field(repr=False)
    validation_steps: Tensor = field(repr=False)
    validation_losses: Tensor = field(repr=False)
    best_step: int
    best_loss: float
    stopped_early: bool
    steps: int
    skipped_steps: int
    seconds: float
    density: Density = field(repr=False)
    first_steps: int = 0
    interrupted: bool = False
    compiled: bool = False
    columns: list[str] | None = None
    context_columns: list[str] | None = None

    def __str__(self) -> str:
        if len(self.validation_losses):
            what = f"validation loss {self.best_loss:.4g} nats a row at step {self.best_step} of {self.steps}"
        else:
            last = self.losses[-LAST_STEPS:].nanmean().item()
            what = f"loss {last:.4g} nats a row, the mean of the last of {self.steps} steps; no validation data"
        notes = [f"{self.seconds:.1f} s"]
        if self.stopped_early:
            notes.append("interrupted" if self.interrupted else "stopped early")
        if self.skipped_steps:
            notes.append(
                f"{self.skipped_steps} steps skipped, as their loss or gradient was not finite"
            )
        return f"{what} ({'; '.join(notes)})"

    def summary(self) -> Any:
        """The evaluations as a `pandas.DataFrame`: step, mean loss since the last one, validation loss."""
        import pandas as pd

        steps = self.validation_steps.tolist() or [self.steps]
        starts = [0, *steps[:-1]]
        means = [
            self.losses[a:b].nanmean().item() if b > a else math.nan
            for a, b in zip(starts, steps, strict=True)
        ]
        held_out = self.validation_losses.tolist() or [math.nan]
        return pd.DataFrame({"step": steps, "loss": means, "validation_loss": held_out})


def result_of(run: Run, interrupted: bool, rows: Rows) -> DensityFitResult:
    """The outcome of one run."""
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
        compiled=run.objective.compiled is not None,
        columns=rows.columns,
        context_columns=rows.context_columns,
    )


def joined(first: DensityFitResult, second: DensityFitResult) -> DensityFitResult:
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
