"""Rounds of training: growing lengths, falling rates, the best state kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..importance import ImportanceResult
from .trainer import Trainer

# Lengths grow by the first factor and rates fall by the second. Rounds that restarted at the full rate lost what a
# 91-dimensional hierarchical model had reached.
GROWTH, DECLINE = 1.5, 0.7
# Within a round the rate falls to this share along a cosine; over the rounds to no less than the second.
ROUND_END, LEAST_RATE = 0.05, 0.1


@dataclass
class TrainingState:
    """The state of a run, as callbacks get it: after every round, and every `CALLBACK_STEPS` steps within one.

    Attributes:
        phase: "warm start", "training", "weighing" or "refining".
        step: steps so far.
        round: rounds so far.
        loss: the last finite loss in nats, or NaN.
        losses: of every step, NaN where it was skipped.
        importance: the last weighted draws of the guide, or None.
        stop: set it to True to end the run after this round.
    """

    phase: str = "training"
    step: int = 0
    round: int = 0
    loss: float = math.nan
    losses: list[float] = field(default_factory=list)
    importance: ImportanceResult | None = None
    stop: bool = False

    def record(self) -> dict[str, float]:
        """The numbers, by name, for a logger."""
        weighed = self.importance
        return {
            "step": self.step,
            "round": self.round,
            "loss": self.loss,
            "ess": math.nan if weighed is None else weighed.ess,
            "k_hat": math.nan if weighed is None else weighed.k_hat,
        }

    def describe(self) -> str:
        """The bound and the effective sample size, as far as they are known, for a line of progress."""
        numbers = [] if math.isnan(self.loss) else [f"ELBO {-self.loss:.2f}"]
        if self.importance is not None:
            numbers.append(f"ESS {self.importance.efficiency:.0%}")
        return ", ".join(numbers)


Callback = Callable[[TrainingState], Any]
# Steps between two calls of a callback within a round.
CALLBACK_STEPS = 50


@dataclass(frozen=True)
class Round:
    """One round: its number of steps and the factors of the learning rate at its start and end."""

    num_steps: int
    rate: float
    end: float

    def rate_at(self, i: int) -> float:
        """The factor of the learning rate at step i of the round, along a cosine."""
        share = (1 + math.cos(math.pi * i / self.num_steps)) / 2
        return self.rate * (self.end + (1 - self.end) * share)


def rounds(first: int, max_steps: int) -> Iterator[Round]:
    """Rounds of `first`, 1.5 `first`, ... steps, at falling rates, until `max_steps`."""
    length, rate, done = float(first), 1.0, 0
    while done < max_steps:
        num_steps = min(round(length), max_steps - done)
        yield Round(num_steps, rate, ROUND_END)
        done += num_steps
        length, rate = length * GROWTH, max(rate * DECLINE, LEAST_RATE)


class BestState:
    """The parameters of the best evaluation so far."""

    def __init__(self, guide: Any, trainer: Trainer):
        self.guide, self.trainer = guide, trainer
        self.score, self.se = -math.inf, math.inf
        self.saved: tuple[dict[str, Any], list[torch.Tensor]] | None = None

    def offer(self, score: float, se: float) -> bool:
        """Keeps the present state if it scores higher; returns whether it does, beyond chance."""
        gain = score - self.score
        significant = gain > 2 * math.hypot(se, self.se if math.isfinite(self.se) else 0.0)
        if gain > 0 or self.saved is None:
            self.score, self.se = score, se
            buffers = self.guide.state_dict() if isinstance(self.guide, torch.nn.Module) else {}
            copied = {name: value.detach().clone() for name, value in buffers.items()}
            self.saved = copied, [p.detach().clone() for p in self.trainer.params]
        return significant

    @property
    def is_usable(self) -> bool:
        """Whether any state has had a finite bound."""
        return self.saved is not None and self.score > -math.inf

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the parameters of the best evaluation back."""
        if self.saved is None:
            return
        buffers, params = self.saved
        if buffers:
            self.guide.load_state_dict(buffers)
        # Parameters that appeared after the best evaluation keep their values.
        for p, saved in zip(self.trainer.params, params, strict=False):
            p.copy_(saved)
