"""Settings, learning rates and seeds of the training loops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

OptimFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


def check_settings(lr: float, schedule: str, **counts: float) -> None:
    """Raises `ValueError` for a rate that is not positive, an unknown schedule, and counts that are not 1, 2, ..."""
    for name, value in counts.items():
        if int(value) != value or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a positive number, got {lr!r}")
    if schedule not in ("cosine", "exponential", "constant"):
        raise ValueError(
            f'schedule: expected "cosine", "exponential" or "constant", got {schedule!r}'
        )


def check_factories(**factories: Any) -> None:
    """Raises `TypeError` for an optimizer or a scheduler in place of a function that makes one."""
    for name, value in factories.items():
        if value is not None and not callable(value):
            raise TypeError(
                f"{name}: expected a function that makes one, such as partial(torch.optim.Adam, lr=1e-3) or "
                f"partial(torch.optim.lr_scheduler.StepLR, step_size=100), got a {type(value).__name__}"
            )


def decay(schedule: str, num_steps: int, final: float) -> Callable[[int], float]:
    """The factor of the learning rate at each step: from 1 to `final`."""
    if schedule == "cosine":
        return lambda i: final + (1 - final) * (1 + math.cos(math.pi * i / num_steps)) / 2
    if schedule == "exponential":
        return lambda i: final ** (i / num_steps)
    return lambda i: 1.0


def warn_of_skipped(skipped: int, num_steps: int) -> None:
    """Warns whoever called the function that calls this, if steps were skipped."""
    if skipped:
        warnings.warn(
            f"{skipped} of {num_steps} steps had no finite loss and gradient, and were skipped",
            stacklevel=3,
        )


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the generators of Python, NumPy and torch, and restores their states afterwards."""
    if seed is None:
        yield
        return
    state = pyro.util.get_rng_state()
    try:
        pyro.set_rng_seed(seed)
        yield
    finally:
        pyro.util.set_rng_state(state)
