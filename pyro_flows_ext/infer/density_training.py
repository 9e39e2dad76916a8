"""`fit_density`: train a density on data in mini-batches, and keep the parameters that were best on other data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributions import Density
from ..programs import describe_nonfinite
from ._loop import (
    MAX_BAD_STEPS,
    OptimFactory,
    check_settings,
    decay,
    seeded,
    warn_of_skipped,
)

# Every look at the validation data takes the same random numbers: two looks at a bound differ by the parameters alone.
LOOK_SEED = 0
# A look goes through so many rows at a time at least: small batches are for gradients.
MIN_CHUNK = 512


@dataclass(frozen=True)
class DensityFitResult:
    """What came of training a density. All losses are in nats a row.

    `losses`: of every step taken, on its batch, before its update (NaN where skipped). `validation_losses[i]` is that
    of the validation data after `validation_steps[i]` steps, the first before any; both are empty without such data.
    `best_step`: after how many steps the parameters were those that the density has now, and `best_loss` the validation
    loss there (NaN without validation data). `stopped_early`: patience ended the run. `seconds` counts the looks at the
    validation data too. `first_steps`: how many of the steps were those of a part that trains first.
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


def fit_density(
    density: Density,
    data: Tensor,
    *,
    validation: Tensor | None = None,
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
    seed: int | None = None,
    progress: bool = True,
) -> DensityFitResult:
    """Trains `density` on the rows of `data` `(N, *event_shape)` by maximum likelihood, or by its bound.

    The loss is the mean of -`density.objective(rows)` over a batch, which is -`log_prob`, and with it the penalty of a
    `NestedDropoutFlow`. Batches go through all rows in a new order each time; rows are taken to the density's dtype and
    device batch by batch. The density is in training mode for the steps, in eval mode for looks and afterwards.

    `validation` rows are scored before the first step, after every `evaluate_every` steps (None: a fiftieth of the run)
    and at the end, always with the same random numbers. The density ends with the parameters and buffers that were best
    there; the run ends early after `patience` looks in a row that were no better (None: never). Without validation data
    the last parameters stay.

    The first `first_steps` of the `num_steps` hold what is `trained_later` in a density, the flow of a `FlowVAE` (None: half
    of them, where there is such a part). Each part of the run has looks, patience and a falling rate of its own, and the
    second begins with what was best in the first.

    Adam's rate falls from `lr` to `final_lr * lr` (`schedule`: "cosine", "exponential" or "constant"); `optim` makes
    another optimizer from the parameters. Gradients are clipped to `clip_norm` jointly. A step whose loss or gradient
    is not finite changes nothing and is counted. `seed` makes the run reproducible and leaves the global generators as
    they were; the density was made before, from a seed of its own.

    Raises `TypeError` for what is no `Density`, `ValueError` for arguments out of range, values that are not finite and
    rows that do not fit the density, `FloatingPointError` after 100 steps in a row without a finite gradient, and where
    no look was finite.
    """
    counts = {"num_steps": num_steps, "batch_size": batch_size, "evaluate_every": evaluate_every, "patience": patience}  # fmt: skip
    check_settings(lr, schedule, **{k: n for k, n in counts.items() if n is not None})
    later = _later(_check_density(density))
    if first_steps is None:
        first_steps = num_steps // 2 if later else 0
    if int(first_steps) != first_steps or not 0 <= first_steps < num_steps:
        raise ValueError(
            f"first_steps: expected an integer from 0 to {num_steps - 1}, got {first_steps!r}"
        )
    if first_steps and not later:
        raise ValueError("first_steps: expected 0 for a density without a part to train later")

    def run(num_steps: int) -> DensityFitResult:
        every = max(1, num_steps // 50) if evaluate_every is None else evaluate_every
        make_optimizer = optim or partial(torch.optim.Adam, lr=lr)
        with seeded(seed):
            watch = _Watch(density, data, validation, max(batch_size, MIN_CHUNK), patience)
            rate = decay(schedule, num_steps, final_lr)
            trainer = _Trainer(density, make_optimizer, rate, clip_norm)
            return _run(trainer, watch, _batches(data, batch_size), num_steps, every, progress)

    if first_steps:
        with _held(later):
            first = run(first_steps)
        result = _joined(first, run(num_steps - first_steps))
    else:
        result = run(num_steps)
    warn_of_skipped(result.skipped_steps, result.steps)
    return result


def _run(
    trainer: _Trainer,
    watch: _Watch,
    batches: Iterator[Tensor],
    num_steps: int,
    every: int,
    progress: bool,
) -> DensityFitResult:
    """Steps and looks, until there are no more or no better ones."""
    start = time.perf_counter()
    losses: list[float] = []
    watch.look(0)
    for step in _progress(num_steps, losses, watch, progress):
        losses.append(trainer.step(next(batches)))
        if (step + 1) % every == 0 or step + 1 == num_steps:
            watch.look(step + 1)
            if watch.num_worse >= watch.patience:
                break
    watch.restore()
    return DensityFitResult(
        losses=torch.tensor(losses, dtype=torch.float64),
        validation_steps=torch.tensor(watch.steps, dtype=torch.int64),
        validation_losses=torch.tensor(watch.losses, dtype=torch.float64),
        best_step=len(losses) if watch.validation is None else watch.best_step,
        best_loss=watch.best_loss,
        stopped_early=len(losses) < num_steps,
        steps=len(losses),
        skipped_steps=sum(not math.isfinite(value) for value in losses),
        seconds=time.perf_counter() - start,
        density=watch.density,
    )


def _joined(first: DensityFitResult, second: DensityFitResult) -> DensityFitResult:
    """Two runs as one. The second's look before any step is at what the first was best with, and is left out."""
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


class _Watch:
    """Looks at the validation data, and the parameters that were best there."""

    def __init__(
        self,
        density: Density,
        data: Tensor,
        validation: Tensor | None,
        chunk: int,
        patience: int | None,
    ):
        self.density, self.validation, self.chunk = density, validation, chunk
        self.patience = math.inf if patience is None else patience
        self.like = like = _trained(density)[0]
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.best_step, self.best_loss, self.num_worse = 0, math.nan, 0
        self.state: dict[str, Tensor] = {}
        density.eval()
        for name, rows in (("data", data), ("validation", validation)):
            if rows is not None:
                _check_rows(name, density, rows, like)

    def look(self, step: int) -> None:
        """Scores the validation data after so many steps."""
        if self.validation is None:
            return
        self.steps.append(step)
        self.losses.append(self._loss(self.validation))
        self.num_worse += 1
        # Comparisons with NaN are False: what is not finite is never best, and anything better than nothing.
        if not self.losses[-1] >= self.best_loss and math.isfinite(self.losses[-1]):
            self.best_step, self.best_loss, self.num_worse = step, self.losses[-1], 0
            self.state = {k: v.detach().clone() for k, v in self.density.state_dict().items()}

    def restore(self) -> None:
        """Puts the best parameters back, and the density in eval mode."""
        self.density.eval()
        if self.validation is None:
            return
        if not self.state:
            raise FloatingPointError(
                f"no finite validation loss in {len(self.losses)} looks: look for rows outside of the density's "
                "support"
            )
        self.density.load_state_dict(self.state)

    @torch.no_grad()
    def _loss(self, rows: Tensor) -> float:
        self.density.eval()
        total = 0.0
        devices = [self.like.device] if self.like.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(LOOK_SEED)
            for part in rows.split(self.chunk):
                total -= self.density.objective(part.to(self.like)).double().sum().item()
        return total / len(rows)


class _Trainer:
    """Loss, gradient and update of one step."""

    def __init__(
        self,
        density: Density,
        optim: OptimFactory,
        rate: Callable[[int], float],
        clip_norm: float | None,
    ):
        self.density, self.rate = density, rate
        self.parameters = _trained(density)
        self.optimizer = optim(self.parameters)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.clip_norm = math.inf if clip_norm is None else clip_norm
        self.count = self.num_bad = 0

    def step(self, rows: Tensor) -> float:
        """The loss before the update; NaN, and no update, if it or its gradient is not finite."""
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.rate(self.count)
        self.count += 1
        self.density.train()
        self.optimizer.zero_grad()
        loss = -self.density.objective(rows.to(self.parameters[0])).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if bool(loss.isfinite() & norm.isfinite()):
            self.optimizer.step()
            self.num_bad = 0
            return loss.item()
        self.num_bad += 1
        if self.num_bad == MAX_BAD_STEPS:
            raise FloatingPointError(
                f"no finite loss and gradient in {self.num_bad} steps in a row (up to step {self.count}): lower lr, "
                "standardise the data, or look for rows outside of the density's support"
            )
        return math.nan


def _batches(data: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches without end: all rows in a new order, and again. What is left over at the end of an order is left out."""
    size = min(batch_size, len(data))
    while True:
        order = torch.randperm(len(data)).to(data.device)
        for rows in order[: len(data) // size * size].split(size):
            yield data[rows]


def _trained(density: Density) -> list[Tensor]:
    return [p for p in density.parameters() if p.requires_grad]


def _later(density: Density) -> list[Tensor]:
    """The parameters of what is `trained_later` in any part of the density; none if nothing else trains."""
    parts: Any = [p.trained_later for p in density.modules() if hasattr(p, "trained_later")]
    later = {p: None for part in parts for p in part.parameters() if p.requires_grad}
    return list(later) if len(later) < len(_trained(density)) else []


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


def _check_density(density: Any) -> Density:
    if not isinstance(density, Density):
        raise TypeError(
            f"density: expected a Density, such as FlowDistribution, got a {type(density).__name__}"
        )
    if not _trained(density):
        raise ValueError("density: expected one with parameters to train, got none")
    return density


@torch.no_grad()
def _check_rows(name: str, density: Density, rows: Any, like: Tensor) -> None:
    if not isinstance(rows, Tensor) or rows.dim() == 0 or len(rows) == 0:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{name}: expected a tensor with at least one row, got {got}")
    problem = describe_nonfinite(name, rows)
    if problem is not None:
        raise ValueError(f"{problem}: leave such rows out")
    scored = density.log_prob(rows[:1].to(like)).shape  # which refuses events of other shapes
    if scored != (1,):
        raise ValueError(
            f"{name}: expected rows (N, {', '.join(map(str, density.event_shape))}), one log_prob for each, got shape "
            f"{tuple(rows.shape)}, and {tuple(scored)} for its first row"
        )


def _progress(num_steps: int, losses: list[float], watch: _Watch, show: bool) -> Iterator[int]:
    if not show:
        yield from range(num_steps)
        return
    from tqdm.auto import tqdm

    with tqdm(total=num_steps, desc="fit_density", unit="step") as bar:
        for step in range(num_steps):
            yield step
            bar.update()
            if step % 50 == 49:
                recent = torch.tensor(losses[-100:]).nanmean().item()
                seen = f", validation {watch.losses[-1]:.3f}" if watch.losses else ""
                bar.set_postfix_str(f"loss {recent:.3f}{seen}", refresh=False)
