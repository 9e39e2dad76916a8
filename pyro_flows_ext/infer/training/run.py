"""One run of training: rounds, verdicts, checkpoints, interruption."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim

from ...programs import Program, nonfinite_ignored
from .._loop import OptimFactory, SchedulerFactory, decay
from ..distributed import Processes
from ..warm_start import Mode, WarmStart
from . import checkpoint as files
from .objectives import Objective, PathObjective
from .outcome import mean_and_se
from .posterior import Posterior
from .progress import Progress
from .rounds import CALLBACK_STEPS, BestState, Callback, TrainingState, rounds
from .steps import take_steps
from .timing import Timing
from .trainer import Trainer
from .verdict import TrustCheck

# Draws weighed after a round.
NUM_DRAWS = 2000
# Steps of the first round: a flow in whitened coordinates gains most of what it will in a hundred.
FIRST_ROUND = 100
# Rounds in a row without a gain beyond chance that end a run.
LEVEL_ROUNDS = 2
# Where steps are not finite.
ADVICE = "check the model for values outside a support, lower lr, or start closer with init_loc_fn and init_scale"


@dataclass(frozen=True)
class Options:
    """The settings of `fit` that a run reads."""

    max_steps: int
    is_fixed: bool
    target_ess: float
    lr: float
    schedule: str
    final_lr: float
    clip_norm: float | None
    num_particles: int | None
    optim: OptimFactory | PyroOptim | None
    scheduler: SchedulerFactory | None
    refine: bool | str
    compile: bool | str
    callback: Callback | None
    checkpoint: str | os.PathLike[str] | None
    progress: bool


class Run:
    """Trains a guide on an objective and checks its draws, as `Options` say."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: Options,
        processes: Processes,
    ):
        self.processes = processes
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.options = options
        self.state = TrainingState()
        self.progress = Progress(options.progress and processes.is_first, options.max_steps, "fit")
        self.warm_start: WarmStart | None = None
        self.modes: list[Mode] = []
        self.in_round, self.round_rest, self.level = 0, 0, 0
        self.saver = files.Saver(options.checkpoint if processes.is_first else None)
        self.problem: str | None = None

    def announce(self, phase: str) -> None:
        """Shows what is going on now."""
        self.progress.phase(self.state, phase)

    def prepare(self, objective: Objective, posterior: Posterior | None) -> None:
        """Sets what is trained and what checks it."""
        options = self.options
        self.trainer = Trainer(
            objective,
            options.optim,
            options.lr,
            options.clip_norm,
            options.scheduler,
            self.processes,
        )
        self.best = BestState(self.guide, self.trainer)
        self.check: TrustCheck | None = None
        if self.warm_start is not None:
            self.modes = list(self.warm_start.modes)
        if posterior is not None:
            self.check = TrustCheck(
                posterior, options.target_ess, bool(options.refine), NUM_DRAWS, self.modes
            )

    # --- training ---

    def train(self) -> tuple[str, bool]:
        """Runs to the end: the reason for it, and whether the draws are trusted."""
        self.processes.spread()
        try:
            # Steps whose loss is not finite are skipped and counted: Pyro's warnings of them are left out.
            with nonfinite_ignored(), _checks_first():
                return self._train_fixed() if self.options.is_fixed else self._train_rounds()
        except FloatingPointError as error:
            # A gradient that was never finite is an error of the model, whatever the start is worth.
            if math.isnan(self.state.loss) or not self.best.is_usable:
                raise
            self.problem = str(error)
            return "not finite", self._is_trusted_at_last()
        except KeyboardInterrupt:
            self.best.restore()
            return "interrupted", False
        finally:
            self.progress.close(self.state)

    def _train_fixed(self) -> tuple[str, bool]:
        options, num_steps = self.options, self.options.max_steps
        timing = Timing(num_steps, options.compile)
        rate_at = decay(options.schedule, num_steps, options.final_lr)

        def on_step() -> None:
            if self.trainer.compiled is None and timing.is_due(self.state.step):
                self.trainer.compile(timing)
            self._on_step()

        self.announce("training")
        self._take(num_steps, rate_at, on_step)
        with self.processes.alike():
            is_trusted = self._judge_fixed()
        return "fixed", self._agree(is_trusted)

    def _judge_fixed(self) -> bool:
        result = self._weigh()
        if self.check is None or result is None or self.options.refine is not True:
            return False
        self.announce("refining")
        return self.check.is_trusted(result, last=True)

    def _take(
        self, num_steps: int, rate_at: Callable[[int], float], on_step: Callable[[], None]
    ) -> None:
        """Takes what is left of the steps of a round."""
        step, state, first = self.trainer.step, self.state, self.in_round
        for _ in take_steps(step, state, num_steps, rate_at, first, advice=ADVICE):
            on_step()

    def _train_rounds(self) -> tuple[str, bool]:
        """Rounds until the draws are trusted, rounds gain nothing, or steps run out."""
        if self.state.step == 0 and self._evaluate_round(is_first=True):
            return "trusted", True
        if self.check is not None and self._agree(bool(self.check.findings)):
            return "level", False
        for number, r in enumerate(rounds(FIRST_ROUND, self.options.max_steps)):
            if number < self.state.round:
                continue
            self.announce("training")
            self._take(r.num_steps, r.rate_at, self._on_step)
            self.state.round, self.in_round = self.state.round + 1, 0
            if self._evaluate_round():
                return "trusted", True
            self._call_back()
            if self.check is not None and self._agree(
                bool(self.check.findings or self.check.is_exhausted)
            ):
                break
            # A run that is killed in its last check would go on with another round if its end were saved.
            if self.level < LEVEL_ROUNDS or self.state.stop:
                self._save()
            if self.state.stop or self.level >= LEVEL_ROUNDS:
                return ("interrupted" if self.state.stop else "level"), self._is_trusted_at_last()
        else:
            return "out of steps", self._is_trusted_at_last()
        self.best.restore()
        return "level", False

    def _evaluate_round(self, is_first: bool = False) -> bool:
        """Whether the draws can be trusted, as the first process finds."""
        with self.processes.alike():
            is_trusted = self._judge_round(is_first)
        self.level = int(self.processes.of_first(self.level))
        return self._agree(is_trusted)

    def _judge_round(self, is_first: bool) -> bool:
        """Weighs or averages, keeps the best state, and decides whether the draws can be trusted."""
        if self.check is None:
            if is_first:
                return False
            window = torch.tensor(self.state.losses[-max(20, self._last_round() // 3) :])
            mean, se = self._of_first(*mean_and_se(window))
            self._note(self.best.offer(-mean, se))
            return False
        result = self._weigh()
        if result is None:
            return False
        finite = result.log_weights[result.log_weights > -math.inf]
        score = finite.mean().item() if len(finite) > 1 else -math.inf
        se = finite.std().item() / len(finite) ** 0.5 if len(finite) > 1 else math.inf
        score, se = self._of_first(score, se)
        gained = self.best.offer(score, se)
        if not is_first:
            self._note(gained)
            # The error is not known where the round left no draw of finite weight.
            lost = score == -math.inf < self.best.score
            if not gained and (lost or score < self.best.score - 2 * se):
                self.best.restore()
                self.trainer.restart()
        self.announce("refining")
        return self.check.is_trusted(result, first=is_first)

    def _of_first(self, *values: float) -> list[float]:
        """Values of the first process: rounding on GPUs may differ, and decisions with it."""
        return [self.processes.of_first(value) for value in values]

    def _agree(self, flag: bool) -> bool:
        """The flag of the first process."""
        return bool(self.processes.of_first(flag))

    def _note(self, gained: bool) -> None:
        self.level = 0 if gained else self.level + 1

    def _last_round(self) -> int:
        lengths = [r.num_steps for r in rounds(FIRST_ROUND, self.options.max_steps)]
        return lengths[self.state.round - 1]

    def _is_trusted_at_last(self) -> bool:
        """The verdict on the best state, with the full budget for chains, as the first process finds."""
        self.best.restore()
        with self.processes.alike():
            is_trusted = self._judge_at_last()
        return self._agree(is_trusted)

    def _judge_at_last(self) -> bool:
        if self.check is None:
            return False
        result = self._weigh()
        if result is None:
            return False
        self.announce("refining")
        return self.check.is_trusted(result, last=True)

    def _weigh(self) -> Any:
        """Weighted draws; None, with the reason in a warning, where the guide's draws have no weights."""
        if self.check is None:
            return None
        self.announce("weighing")
        try:
            self.state.importance = self.check.weigh()
        except ValueError as error:
            warnings.warn(f"fit: the guide's draws are not weighed: {error}", stacklevel=5)
            self.check = None
            return None
        return self.state.importance

    def _on_step(self) -> None:
        self.in_round += 1
        if self.state.step % CALLBACK_STEPS == 0:
            recent = torch.tensor(self.state.losses[-CALLBACK_STEPS:], dtype=torch.float64)
            self.trainer.evaluated(recent.nanmean().item())
            self._call_back()
        self.progress.update(self.state)
        if self.saver.is_due:
            self._save()

    def _call_back(self) -> None:
        if self.options.callback is not None:
            self.options.callback(self.state)
            self.state.stop = self.processes.any(self.state.stop)

    # --- checkpoints ---

    def _save(self) -> None:
        if self.saver.path is None:
            return
        best = None
        if self.best.saved is not None:
            best = [self.best.score, self.best.se, *self.best.saved]
        self.saver.save(
            {
                "step": self.state.step,
                "round": self.state.round,
                "in_round": self.in_round,
                "level": self.level,
                "losses": torch.tensor(self.state.losses, dtype=torch.float64),
                "guide": self.guide.state_dict() if isinstance(self.guide, torch.nn.Module) else {},
                "trainer": self.trainer.state(),
                "num_particles": self._num_particles(),
                "best": best,
                "budget": None if self.check is None else self.check.budget,
                "num_gradients": 0 if self.check is None else self.check.num_gradients,
                "num_declined": 0 if self.check is None else self.check.num_declined,
                "modes": [[m.loc, m.log_joint, m.log_mass, m.num_climbs] for m in self.modes],
                "random": files.random_state(),
            },
        )

    def _num_particles(self) -> int | None:
        """Those of all processes together."""
        num = getattr(self.trainer.objective, "num_particles", None)
        return None if num is None else num * self.processes.count

    def resume(self) -> None:
        """Goes back to the checkpoint. Raises `ValueError` where it is not of this model and guide."""
        saved = files.load(self.options.checkpoint)  # type: ignore[arg-type]
        if isinstance(self.guide, torch.nn.Module):
            self.guide.load_state_dict(saved["guide"])
        objective = self.trainer.objective
        if self.options.num_particles is None and isinstance(objective, PathObjective):
            # The default depends on the seconds that a gradient takes, which differ between runs.
            objective.num_particles = max(1, saved["num_particles"] // self.processes.count)
        self.trainer.load_state(saved["trainer"])
        self.state.step, self.state.round = saved["step"], saved["round"]
        self.in_round, self.level = saved["in_round"], saved["level"]
        self.state.losses = saved["losses"].tolist()
        if saved["best"] is not None:
            self.best.score, self.best.se, *rest = saved["best"]
            self.best.saved = (rest[0], rest[1])
        device = self.trainer.params[0].device if self.trainer.params else "cpu"
        self.modes = [Mode(loc.to(device), *rest) for loc, *rest in saved["modes"]]
        if self.check is not None:
            self.check.modes, self.check.budget = self.modes, saved["budget"]
            self.check.num_gradients = saved["num_gradients"]
            self.check.num_declined = saved.get("num_declined", 0)
        files.set_random_state(saved["random"])

    def draw(self, num: int) -> dict[str, torch.Tensor]:
        """Draws of the guide alone."""
        if hasattr(self.guide, "sample_posterior"):
            return self.guide.sample_posterior(num, *self.args, **self.kwargs)
        with torch.no_grad():
            predictive = pyro.infer.Predictive(self.guide, num_samples=num)
            draws = predictive(*self.args, **self.kwargs)
        # Without sites of the guide alone, such as the unconstrained values of AutoNormal.
        own = {f"{name}_unconstrained" for name in draws}
        return {k: v for k, v in draws.items() if not k.startswith("_") and k not in own}


@contextmanager
def _checks_first() -> Iterator[None]:
    """Without Pyro's checks of every step, a third of its time: `fit` has made them on single traces."""
    with pyro.validation_enabled(False):
        yield
