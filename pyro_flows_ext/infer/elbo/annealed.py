"""Annealing: a bound whose terms come in, or weigh in, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ...programs import Program
from .importance_weighted import ImportanceWeightedELBO
from .weights import TEMPERATURE

Schedule = Callable[[int], float]

TERMS = ("joint", "likelihood", "kl")
JITTED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


def linear(num_steps: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """β_t = start + (end - start) t / num_steps, and `end` from step `num_steps` on."""
    return partial(_linear, *_check(num_steps, start, end))


def cosine(num_steps: int, start: float = 0.0, end: float = 1.0) -> Schedule:
    """β_t = start + (end - start) (1 - cos(π t / num_steps)) / 2, and `end` from step `num_steps` on: level at both ends."""
    return partial(_cosine, *_check(num_steps, start, end))


def rezende(num_steps: int = 10_000, start: float = 0.01) -> Schedule:
    """β_t = min(1, start + t / num_steps). Source: Rezende & Mohamed 2015, eq. 20, with the term "joint"."""
    num_steps, start, _ = _check(num_steps, start, 1.0)
    return partial(_rezende, num_steps, start)


class AnnealedELBO(ELBO):
    """Any ELBO with an inverse temperature β_t on some of its terms, t counting the calls of `loss_and_grads`.

    `schedule`: step -> β, such as `linear`, `cosine` or `rezende`. `term` is what β multiplies:

        "joint"         β log p(x, z) - log q(z)                         Rezende & Mohamed 2015, eq. 20
        "likelihood"    β log p(x | z) + log p(z) - log q(z)             from the prior to the posterior
        "kl"            log p(x | z) + β (log p(z) - log q(z))           KL warm-up

    with every observed site and factor of the model in log p(x | z), and every site and factor of the guide in log q. The
    first two let the guide find all modes before it has to fit any; the last keeps a decoder from ignoring its latents.
    While β ≠ 1 none of them is a bound on log p(x).

    `loss` (so `SVI.evaluate_loss` too) is the bound itself, at β = 1, comparable from step to step. `loss_and_grads` and
    `differentiable_loss` are the annealed one, and only the former counts steps: with `elbo(model, guide)` as a module,
    call `advance()` after each. `state_dict` and `load_state_dict` hold the count. In `ImportanceWeightedELBO` β goes
    inside the weights, where a scale does not. `TraceEnum_ELBO` wants one scale on all that it sums over: "joint" there.

    Raises `TypeError` for what is no ELBO or no schedule, and `ValueError` for another `term`; for "joint" with
    `TraceMeanField_ELBO`, whose analytic KL has prior and entropy in one; for an ELBO that traces its loss once, with β
    in it; and for a β that is negative or not finite.
    """

    def __init__(self, elbo: ELBO, schedule: Schedule, term: str = "joint"):
        if not isinstance(elbo, ELBO):
            raise TypeError(f"elbo: expected a pyro.infer.ELBO, got a {type(elbo).__name__}")
        if not callable(schedule):
            raise TypeError(
                f"schedule: expected a function from the step to β, such as linear(1000), got {schedule!r}"
            )
        if term not in TERMS:
            raise ValueError(f"term: expected one of {', '.join(TERMS)}; got {term!r}")
        if isinstance(elbo, JITTED):
            raise ValueError(
                f"elbo: {type(elbo).__name__} traces its loss once and would keep the first β; use its eager form"
            )
        if term == "joint" and isinstance(elbo, TraceMeanField_ELBO):
            raise ValueError(
                'term="joint" weighs log p(z) and log q(z) apart, and TraceMeanField_ELBO has both in one analytic KL; '
                'use Trace_ELBO, or term="likelihood"'
            )
        super().__init__(num_particles=elbo.num_particles)
        self.elbo: Any = elbo  # Pyro's base class declares neither `loss` nor `loss_and_grads`
        self.schedule, self.term = schedule, term
        self.steps = 0

    @property
    def beta(self) -> float:
        """β of the next step."""
        beta = float(self.schedule(self.steps))
        if not 0 <= beta < math.inf:
            raise ValueError(
                f"schedule: expected β >= 0 and finite, got {beta} at step {self.steps}"
            )
        return beta

    def advance(self) -> None:
        """Counts a step."""
        self.steps += 1

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The loss without annealing, β = 1."""
        return self.elbo.loss(model, guide, *args, **kwargs)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The annealed loss of the present step, as a tensor."""
        model, guide = self._tempered(model, guide)
        return self.elbo.differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The annealed loss; adds its gradient to the parameters' and counts a step."""
        model, guide = self._tempered(model, guide)
        loss = self.elbo.loss_and_grads(model, guide, *args, **kwargs)
        self.advance()
        return loss

    def state_dict(self) -> dict[str, int]:
        """The state of a resumed run: the number of steps taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where `state_dict` was taken."""
        self.steps = int(state["steps"])

    def _get_trace(
        self, model: Program, guide: Program, args: Any, kwargs: Any
    ) -> tuple[Trace, Trace]:
        return self.elbo._get_trace(*self._tempered(model, guide), args, kwargs)

    def _tempered(self, model: Program, guide: Program) -> tuple[Program, Program]:
        beta, inside = self.beta, isinstance(self.elbo, ImportanceWeightedELBO)
        temper_model = _Temper(
            beta,
            latent=self.term in ("joint", "kl"),
            observed=self.term in ("joint", "likelihood"),
            inside=inside,
        )
        if self.term == "kl":
            guide = _Temper(beta, latent=True, observed=True, inside=inside)(guide)
        return temper_model(model), guide


class _Temper(Messenger):
    """Multiplies log-densities of latent or observed sites by β: as a scale, or as a mark for those who look `inside`."""

    def __init__(self, beta: float, *, latent: bool, observed: bool, inside: bool):
        super().__init__()
        self.beta, self.latent, self.observed = beta, latent, observed
        self.key = TEMPERATURE if inside else "scale"

    def _pyro_sample(self, msg: Any) -> None:
        chosen = self.observed if msg["is_observed"] else self.latent
        if chosen:
            msg[self.key] = self.beta * msg.get(self.key, 1.0)


def _check(num_steps: int, start: float, end: float) -> tuple[int, float, float]:
    if int(num_steps) != num_steps or num_steps < 1:
        raise ValueError(f"num_steps: expected a positive integer, got {num_steps!r}")
    for name, value in (("start", start), ("end", end)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number from 0 on, got {value!r}")
    return int(num_steps), float(start), float(end)


# Functions of the module, so that a schedule can be pickled.


def _linear(num_steps: int, start: float, end: float, step: int) -> float:
    return start + (end - start) * min(1.0, step / num_steps)


def _cosine(num_steps: int, start: float, end: float, step: int) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * min(1.0, step / num_steps))) / 2


def _rezende(num_steps: int, start: float, step: int) -> float:
    return min(1.0, start + step / num_steps)
