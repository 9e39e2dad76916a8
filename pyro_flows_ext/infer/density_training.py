"""`fit_density`: train a density on data in mini-batches, and keep the parameters that were best on other data."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributions import Density
from ._loop import MAX_BAD_STEPS, OptimFactory, check_settings, decay, seeded

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
    validation data too.
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
    seed: int | None = None,
    progress: bool = True,
) -> DensityFitResult:
    """Trains `density` on the rows of `data` `(N, *event_shape)` by maximum likelihood, or by its bound.

    The loss is the mean of -`density.log_prob(rows)` over a batch, and of `density.penalty(rows)` where there is one,
    as in `NestedDropoutFlow`. Batches go through all rows in a new order each time; rows are taken to the density's
    dtype and device batch by batch. The density is in training mode for the steps, in eval mode for looks and
    afterwards.

    `validation` rows are scored before the first step, after every `evaluate_every` steps (None: a fiftieth of the run)
    and at the end, always with the same random numbers. The density ends with the parameters and buffers that were best
    there; the run ends early after `patience` looks in a row that were no better (None: never). Without validation data
    the last parameters stay.

    Adam's rate falls from `lr` to `final_lr * lr` (`schedule`: "cosine", "exponential" or "constant"); `optim` makes
    another optimizer from the parameters. Gradients are clipped to `clip_norm` jointly. A step whose loss or gradient
    is not finite changes nothing and is counted. `seed` makes the run reproducible and leaves the global generators as
    they were; the density was made before, from a seed of its own.

    Raises `TypeError` for what is no `Density`, `ValueError` for arguments out of range, values that are not finite and
    rows that do not fit the density, `FloatingPointError` after 100 steps in a row without a finite gradient, and where
    no look was finite.
    """
    every = max(1, num_steps // 50) if evaluate_every is None else evaluate_every
    counts = {"num_steps": num_steps, "batch_size": batch_size, "evaluate_every": every}
    check_settings(lr, schedule, **counts, patience=1 if patience is None else patience)
    like = _check_density(density)
    with seeded(seed):
        start = time.perf_counter()
        watch = _Watch(density, data, validation, like, max(batch_size, MIN_CHUNK))
        rate = decay(schedule, num_steps, final_lr)
        trainer = _Trainer(
            density, like, optim or partial(torch.optim.Adam, lr=lr), rate, clip_norm
        )
        batches = _batches(data, batch_size)
        losses: list[float] = []
        watch.look(0)
        for step in _progress(num_steps, losses, watch, progress):
            losses.append(trainer.step(next(batches)))
            if (step + 1) % every == 0 or step + 1 == num_steps:
                watch.look(step + 1)
                if patience is not None and watch.num_worse >= patience:
                    break
        watch.restore()
        seconds = time.perf_counter() - start
    skipped = sum(not math.isfinite(value) for value in losses)
    if skipped:
        warnings.warn(
            f"{skipped} of {len(losses)} steps had no finite loss and gradient, and were skipped",
            stacklevel=2,
        )
    return DensityFitResult(
        losses=torch.tensor(losses, dtype=torch.float64),
        validation_steps=torch.tensor(watch.steps, dtype=torch.int64),
        validation_losses=torch.tensor(watch.losses, dtype=torch.float64),
        best_step=len(losses) if validation is None else watch.best_step,
        best_loss=watch.best_loss,
        stopped_early=len(losses) < num_steps,
        steps=len(losses),
        skipped_steps=skipped,
        seconds=seconds,
        density=density,
    )


class _Watch:
    """Looks at the validation data, and the parameters that were best there."""

    def __init__(
        self, density: Density, data: Tensor, validation: Tensor | None, like: Tensor, chunk: int
    ):
        self.density, self.validation, self.like, self.chunk = density, validation, like, chunk
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
                total += _losses(self.density, part.to(self.like)).double().sum().item()
        return total / len(rows)


def _losses(density: Density, rows: Tensor) -> Tensor:
    """What is minimised, by row: `(N)`, in nats."""
    penalty = getattr(density, "penalty", None)
    return -density.log_prob(rows) + (0.0 if penalty is None else penalty(rows))


class _Trainer:
    """Loss, gradient and update of one step."""

    def __init__(
        self,
        density: Density,
        like: Tensor,
        optim: OptimFactory,
        rate: Callable[[int], float],
        clip_norm: float | None,
    ):
        self.density, self.like, self.rate = density, like, rate
        self.optimizer = optim(_trained(density))
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
        loss = _losses(self.density, rows.to(self.like)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(_trained(self.density), self.clip_norm)
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


def _check_density(density: Any) -> Tensor:
    """A parameter, for its dtype and device."""
    if not isinstance(density, Density):
        raise TypeError(
            f"density: expected a Density, such as FlowDistribution, got a {type(density).__name__}"
        )
    trained = _trained(density)
    if not trained:
        raise ValueError("density: expected one with parameters to train, got none")
    return trained[0]


@torch.no_grad()
def _check_rows(name: str, density: Density, rows: Any, like: Tensor) -> None:
    if not isinstance(rows, Tensor) or rows.dim() == 0 or len(rows) == 0:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"{name}: expected a tensor with at least one row, got {got}")
    num_bad = int((~rows.isfinite()).sum())
    if num_bad:
        raise ValueError(f"{name}: {num_bad} of {rows.numel()} values are NaN or infinite")
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
