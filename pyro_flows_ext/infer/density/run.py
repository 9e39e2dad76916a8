"""One run of `fit_density`: steps, evaluations, checkpoints, interruption."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from .._loop import MAX_BAD_STEPS, OptimFactory
from ..training import checkpoint as files
from .checks import check_finite, objective
from .rows import Batch, Rows, Stream

# Every evaluation takes the same random numbers: two values of a bound differ by the parameters alone.
EVALUATION_SEED = 0
# Seconds between two checkpoints.
SAVE_SECONDS = 5.0


@dataclass
class DensityTrainingState:
    """The state of a run of `fit_density`, as its callback gets it after every evaluation.

    Attributes:
        step: steps so far.
        loss: the last finite loss on a batch in nats a row, or NaN.
        losses: of every step, NaN where it was skipped.
        validation_steps, validation_losses: of every evaluation; empty without validation data.
        best_step: the step of the lowest validation loss.
        best_loss: that loss, or NaN.
        stop: set it to True to end the run.
    """

    step: int = 0
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.nan
    stop: bool = False


@dataclass(frozen=True)
class Settings:
    """The settings of a run, without density and data."""

    num_steps: int
    batch_size: int
    evaluate_every: int
    patience: float
    rate: Callable[[int], float]
    optim: OptimFactory
    clip_norm: float
    callback: Callable[[DensityTrainingState], Any] | None
    checkpoint: str | os.PathLike[str] | None
    progress: bool


class Run:
    """Trains a density on rows, and keeps the parameters that were best on validation rows.

    Args:
        density: with its units set.
        train: the rows to train on.
        validation: rows to evaluate on, or None.
        settings: numbers and callbacks.
        kept: what a checkpoint holds beside the state of this run.
    """

    def __init__(
        self,
        density: Density,
        train: Rows,
        validation: Rows | None,
        settings: Settings,
        kept: dict[str, Any],
    ):
        self.density, self.train, self.validation = density, train, validation
        self.settings, self.kept = settings, kept
        self.parameters = trained(density)
        self.like = self.parameters[0]
        self.optimizer = settings.optim(self.parameters)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.state = DensityTrainingState()
        self.best: dict[str, Tensor] = {}
        self.num_worse = self.num_bad = 0
        self.seconds = 0.0
        self.saved_at = time.perf_counter()
        self.batches = _Batches(train, settings.batch_size)
        self.mean_weight = _mean_weight(train, self.like)

    def run(self) -> bool:
        """Steps and evaluations until there are no more or no better ones; returns whether the run was interrupted."""
        begin = time.perf_counter() - self.seconds
        interrupted = False
        try:
            if self.state.step == 0:
                self._evaluate()
            for _ in self._progress():
                self._step()
                step = self.state.step
                if step % self.settings.evaluate_every == 0 or step == self.settings.num_steps:
                    self._evaluate()
                    self.seconds = time.perf_counter() - begin
                    self._call_back()
                    if time.perf_counter() - self.saved_at >= SAVE_SECONDS:
                        self.save()
                    if self.state.stop or self.num_worse >= self.settings.patience:
                        break
        except KeyboardInterrupt:
            interrupted = True
        self.seconds = time.perf_counter() - begin
        self.density.eval()
        self.save()
        self._restore(interrupted)
        return interrupted or self.state.stop

    # --- steps ---

    def _step(self) -> None:
        """One update; none, and a loss of NaN, where loss or gradient is not finite."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.settings.rate(self.state.step)
        raw = next(self.batches)
        if isinstance(self.train, Stream):
            # Tables are checked as a whole before training.
            check_finite("data", raw.values, self.like.dtype)
        self.density.train()
        self.optimizer.zero_grad()
        loss = -self._mean(raw.to(self.like))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        self.state.step += 1
        if bool(loss.isfinite() & norm.isfinite()):
            self.optimizer.step()
            self.num_bad, self.state.loss = 0, loss.item()
            self.state.losses.append(self.state.loss)
            return
        self.num_bad += 1
        self.state.losses.append(math.nan)
        if self.num_bad == MAX_BAD_STEPS:
            raise FloatingPointError(
                f"no finite loss and gradient in {self.num_bad} steps in a row (up to step {self.state.step}): lower lr, "
                "standardise the data, or look for rows outside of the density's support"
            )

    def _mean(self, batch: Batch) -> Tensor:
        """The mean objective of a batch, by its weights over the mean weight of all rows."""
        values = objective(self.density, batch)
        if batch.weights is None:
            return values.mean()
        return (values * batch.weights).mean() / self.mean_weight

    # --- evaluations ---

    def _evaluate(self) -> None:
        """Scores the validation rows, and keeps the parameters if they are the best so far."""
        if self.validation is None:
            return
        state = self.state
        loss = self._validation_loss()
        state.validation_steps.append(state.step)
        state.validation_losses.append(loss)
        self.num_worse += 1
        # Comparisons with NaN are False: what is not finite is never best, and anything better than nothing.
        if not loss >= state.best_loss and math.isfinite(loss):
            state.best_step, state.best_loss, self.num_worse = state.step, loss, 0
            self.best = {k: v.detach().clone() for k, v in self.density.state_dict().items()}

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.density.eval()
        total, weight = 0.0, 0.0
        with torch.random.fork_rng([self.like.device] if self.like.is_cuda else []):
            torch.manual_seed(EVALUATION_SEED)
            for raw in self.validation.chunks(max(self.settings.batch_size, 512)):  # type: ignore[union-attr]
                batch = raw.to(self.like)
                values = objective(self.density, batch).double()
                if batch.weights is not None:
                    values = values * batch.weights
                total -= values.sum().item()
                weight += len(values) if batch.weights is None else batch.weights.sum().item()
        return total / weight if weight else math.nan

    def _restore(self, interrupted: bool) -> None:
        """Puts the best parameters back, and the density in eval mode."""
        self.density.eval()
        if self.validation is None:
            return
        if self.best:
            self.density.load_state_dict(self.best)
        elif not interrupted:
            raise FloatingPointError(
                f"no finite validation loss in {len(self.state.validation_losses)} evaluations: look for rows outside of "
                "the density's support"
            )

    def _call_back(self) -> None:
        if self.settings.callback is not None:
            self.settings.callback(self.state)

    # --- checkpoints ---

    def save(self) -> None:
        """Writes the checkpoint, if there is to be one."""
        if self.settings.checkpoint is None:
            return
        state = self.state
        files.save(
            self.settings.checkpoint,
            {
                **self.kept,
                "step": state.step,
                "losses": torch.tensor(state.losses, dtype=torch.float64),
                "validation": [state.validation_steps, state.validation_losses],
                "best": [state.best_step, state.best_loss, self.best],
                "counts": [self.num_worse, self.num_bad],
                "seconds": self.seconds,
                "density": self.density.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "epoch": self.batches.state(),
                "random": files.random_state(),
            },
        )
        self.saved_at = time.perf_counter()

    def resume(self, saved: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        state = self.state
        state.step, state.losses = saved["step"], saved["losses"].tolist()
        state.validation_steps, state.validation_losses = saved["validation"]
        state.best_step, state.best_loss, self.best = saved["best"]
        self.num_worse, self.num_bad = saved["counts"]
        finite = [loss for loss in state.losses if math.isfinite(loss)]
        state.loss = finite[-1] if finite else math.nan
        self.seconds = saved["seconds"]
        self.density.load_state_dict(saved["density"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.batches.load_state(saved["epoch"])
        files.set_random_state(saved["random"])

    def _progress(self) -> Iterator[int]:
        first, num_steps = self.state.step, self.settings.num_steps
        if self.num_worse >= self.settings.patience:
            return
        if not self.settings.progress:
            yield from range(first, num_steps)
            return
        from tqdm.auto import tqdm

        with tqdm(initial=first, total=num_steps, desc="fit_density", unit="step") as bar:
            for step in range(first, num_steps):
                yield step
                bar.update()
                if step % 50 == 49:
                    recent = torch.tensor(self.state.losses[-100:]).nanmean().item()
                    losses = self.state.validation_losses
                    seen = f", validation {losses[-1]:.3f}" if losses else ""
                    bar.set_postfix_str(f"loss {recent:.3f}{seen}", refresh=False)


class _Batches:
    """Batches without end: all rows in a new order, and again."""

    def __init__(self, rows: Rows, batch_size: int):
        self.rows, self.batch_size = rows, batch_size
        self.began: Tensor | None = None
        self.used = 0
        self.epoch: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self.epoch is not None:
            batch = next(self.epoch, None)
            if batch is not None:
                self.used += 1
                return batch
        self.began, self.used = torch.get_rng_state(), 1
        self.epoch = self.rows.epoch(self.batch_size)
        return next(self.epoch)

    def state(self) -> list[Any]:
        """The generator's state at the start of this epoch, and how many of its batches are used."""
        return [self.began, self.used]

    def load_state(self, state: list[Any]) -> None:
        """Goes to the same place of the same epoch."""
        self.began, self.used = state
        if self.began is None:
            return
        torch.set_rng_state(self.began)
        self.epoch = self.rows.epoch(self.batch_size)
        for _ in range(self.used):
            next(self.epoch)


def trained(density: Density) -> list[Tensor]:
    """The parameters with a gradient."""
    return [p for p in density.parameters() if p.requires_grad]


def _mean_weight(rows: Rows, like: Tensor) -> float:
    total, count = 0.0, 0
    for batch in rows.chunks(65_536):
        if batch.weights is None:
            return 1.0
        total, count = total + batch.weights.double().sum().item(), count + len(batch.weights)
    return total / count
