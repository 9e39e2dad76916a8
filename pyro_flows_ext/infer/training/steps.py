"""The loop under every kind of training: steps, those that change nothing, and when to give up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

# A step whose loss or gradient is not finite is skipped; so many in a row mean that no step will ever be finite.
MAX_BAD_STEPS = 100


class StepState(Protocol):
    """The counts of the loop: steps, the last finite loss, and the losses of all steps, NaN where one was skipped."""

    step: int
    loss: float
    losses: list[float]


def take_steps(
    step: Callable[[float], float | None],
    state: StepState,
    num_steps: int,
    rate_at: Callable[[int], float],
    first: int = 0,
    *,
    advice: str,
) -> Iterator[int]:
    """Takes steps, and yields the number of those taken after each.

    Args:
        step: takes one at a factor of the learning rate; returns its loss, or None where nothing was updated.
        state: is kept up to date.
        num_steps: how many steps there are in all.
        rate_at: the factor at step 0, 1, ...
        first: how many of them were taken before.
        advice: what to do about losses that are not finite.

    Raises:
        FloatingPointError: after 100 steps in a row without a finite loss and gradient.
    """
    bad = _bad_at_end(state.losses)
    for i in range(first, num_steps):
        value = step(rate_at(i))
        state.step += 1
        state.losses.append(math.nan if value is None else value)
        if value is not None:
            bad, state.loss = 0, value
        else:
            bad += 1
            if bad == MAX_BAD_STEPS:
                raise FloatingPointError(
                    f"no finite loss and gradient in {bad} steps in a row (up to step {state.step}): {advice}"
                )
        yield i + 1


def _bad_at_end(losses: list[float]) -> int:
    """How many steps in a row were skipped last."""
    count = 0
    while count < min(len(losses), MAX_BAD_STEPS - 1) and math.isnan(losses[-1 - count]):
        count += 1
    return count
