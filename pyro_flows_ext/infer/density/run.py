"""One run of `fit_density`: evaluations, checkpoints and interruption around the steps of the training loop."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from ..distributed import Processes
from ..training import checkpoint as files
from ..training.progress import Progress
from ..training.steps import take_steps
from ..training.trainer import Trainer
from .batches import BatchObjective
from .checks import objective
from .compiling import Compiler
from .rows import Batch, Rows
from .settings import Settings

# Every evaluation takes the same random numbers: two values of a bound differ by the parameters alone.
EVALUATION_SEED = 0
ADVICE = "lower lr, standardise the data, or look for rows outside of the density's support"


@dataclass
class DensityTrainingState:
    """The state of a run of `fit_density`, as its callback gets it after every evaluation.

    Attributes:
        phase: "training".
        step: steps so far.
        loss: the last finite loss on a batch in nats a row, or NaN.
        losses: of every step, NaN where it was skipped.
        validation_steps, validation_losses: of every evaluation; empty without validation data.
        best_step: the step of the lowest validation loss.
        best_loss: that loss, or NaN.
        stop: set it to True to end the run.
    """

    phase: str = "training"
    step: int = 0
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.nan
    stop: bool = False

    def record(self) -> dict[str, float]:
        """The numbers, by name, for a logger."""
        last = self.validation_losses[-1] if self.validation_losses else math.nan
        return {
            "step": self.step,
            "loss": self.loss,
            "validation_loss": last,
            "best_loss": self.best_loss,
        }

    def describe(self) -> str:
        """The last losses, for a line of progress."""
        seen = f", validation {self.validation_losses[-1]:.3f}" if self.validation_losses else ""
        return f"loss {self.loss:.3f}{seen}"


class Run:
    """Trains a density on rows, and keeps the parameters that were best on validation rows.

    Args:
        density: with its units set.
        train: the rows to train on.
        validation: rows to evaluate on, or None.
        settings: numbers and callbacks.
        kept: what a checkpoint holds beside the state of this run.
        processes: those that train together.
    """

    def __init__(
        self,
        density: Density,
        train: Rows,
        validation: Rows | None,
        settings: Settings,
        kept: dict[str, Any],
        processes: Processes,
    ):
        self.density, self.validation, self.settings, self.kept = density, validation, settings, kept  # fmt: skip
        self.processes = processes
        self.objective = BatchObjective(density, train, settings.batch_size, processes)
        self.like = self.objective.like
        self.trainer = Trainer(
            self.objective,
            settings.optim,
            settings.lr,
            settings.clip_norm,
            settings.scheduler,
            processes,
        )
        self.state = DensityTrainingState()
        self.best: dict[str, Tensor] = {}
        self.num_worse = 0
        self.seconds = 0.0
        self.saver = files.Saver(settings.checkpoint if processes.is_first else None)
        self.progress = Progress(
            settings.progress and processes.is_first, settings.num_steps, "fit_density"
        )

    def run(self) -> bool:
        """Steps and evaluations until there are no more or no better ones; returns whether the run was interrupted."""
        settings, state = self.settings, self.state
        begin = time.perf_counter() - self.seconds
        self.processes.spread()
        interrupted = False
        first = state.step
        compiler = Compiler(settings.num_steps - first, settings.compile)
        try:
            if state.step == 0:
                self._evaluate()
            steps = take_steps(
                self.trainer.step,
                state,
                settings.num_steps,
                settings.rate,
                state.step,
                advice=ADVICE,
            )
            while not state.stop and self.num_worse < settings.patience:
                step = next(steps, None)
                if step is None:
                    break
                self.progress.update(state)
                self._compile(compiler, step - first)
                if step % settings.evaluate_every == 0 or step == settings.num_steps:
                    self._evaluate()
                    self.seconds = time.perf_counter() - begin
                    self._call_back()
                    if self.saver.is_due:
                        self.save()
        except KeyboardInterrupt:
            interrupted = True
        except FloatingPointError as error:
            # Losses that were never better than at the start are an error of the density or the data.
            if not state.best_step:
                raise
            warnings.warn(
                f"{error}. The density has the parameters of step {state.best_step}", stacklevel=6
            )
        finally:
            self.progress.close(state)
        self.seconds = time.perf_counter() - begin
        self.density.eval()
        self.save()
        self._restore(interrupted)
        return interrupted or state.stop

    def _compile(self, compiler: Compiler, steps: int) -> None:
        """Switches to compiled steps, or back, after that many steps of this call."""
        if self.objective.compiled is None:
            self.objective.compiled = compiler.compile(steps, self.objective.compile)
        elif compiler.is_slower():
            self.objective.compiled = None

    # --- evaluations ---

    def _evaluate(self) -> None:
        """Scores the validation rows, and keeps the parameters if they are the best so far."""
        if self.validation is None:
            return
        state = self.state
        loss = self._validation_loss(self.validation)
        state.validation_steps.append(state.step)
        state.validation_losses.append(loss)
        self.num_worse += 1
        # Comparisons with NaN are False: what is not finite is never best, and anything better than nothing.
        if not loss >= state.best_loss and math.isfinite(loss):
            state.best_step, state.best_loss, self.num_worse = state.step, loss, 0
            self.best = {k: v.detach().clone() for k, v in self.density.state_dict().items()}
        self.trainer.evaluated(loss)

    @torch.no_grad()
    def _validation_loss(self, validation: Rows) -> float:
        self.density.eval()
        total, weight = 0.0, 0.0
        with torch.random.fork_rng([self.like.device] if self.like.is_cuda else []):
            torch.manual_seed(EVALUATION_SEED)
            for whole in validation.chunks(max(self.settings.batch_size, 512)):
                batch = self._part(whole).to(self.like)
                if not len(batch.values):
                    continue
                values = objective(self.density, batch).double()
                if batch.weights is not None:
                    values = values * batch.weights
                total -= values.sum().item()
                weight += len(values) if batch.weights is None else batch.weights.sum().item()
        total, weight = self.processes.total(total, weight)
        return total / weight if weight else math.nan

    def _part(self, batch: Batch) -> Batch:
        """This process's part of validation rows, unless its loader gives it rows of its own."""
        if getattr(self.validation, "sampler", None) is not None:
            return batch
        return batch.take(self.processes.part(len(batch.values)))

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
            self.state.stop = self.processes.any(self.state.stop)

    # --- checkpoints ---

    def save(self) -> None:
        """Writes the checkpoint, if there is to be one."""
        if self.saver.path is None:
            return
        state = self.state
        self.saver.save(
            {
                **self.kept,
                "step": state.step,
                "losses": torch.tensor(state.losses, dtype=torch.float64),
                "validation": [state.validation_steps, state.validation_losses],
                "best": [state.best_step, state.best_loss, self.best],
                "num_worse": self.num_worse,
                "seconds": self.seconds,
                "density": self.density.state_dict(),
                "trainer": self.trainer.state(),
                "epoch": self.objective.batches.state(),
                "random": files.random_state(),
            }
        )

    def resume(self, saved: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        state = self.state
        state.step, state.losses = saved["step"], saved["losses"].tolist()
        state.validation_steps, state.validation_losses = saved["validation"]
        state.best_step, state.best_loss, self.best = saved["best"]
        self.num_worse = saved["num_worse"]
        finite = [loss for loss in state.losses if math.isfinite(loss)]
        state.loss = finite[-1] if finite else math.nan
        self.seconds = saved["seconds"]
        self.density.load_state_dict(saved["density"])
        self.trainer.load_state(saved["trainer"], self.objective.parameters)
        self.objective.batches.load_state(saved["epoch"])
        files.set_random_state(saved["random"])
