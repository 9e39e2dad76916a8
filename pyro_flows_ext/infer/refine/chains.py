"""`run_chains`: many short chains of Hamiltonian Monte Carlo in the coordinates of a map from noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...ops import bulk_ess, quantiles, r_hat
from .adaptation import MAX_DIVERGENT, Tuning, adapt
from .energy import Coordinates, Point, PulledBack
from .leapfrog import transition

# The least share of accepted proposals of a chain that moves; a chain below it stays where its start was.
STUCK = 0.05
# A chain is far out where half of its draws are among this share of those of the lowest log density.
FAR_OUT = 0.02
# Nats between the lowest log densities of the halves of a run. Log densities have exponential tails of rate 1, or .5 for a
# Cauchy: in stationary chains the difference is that large by chance in one run of 5000, or 100.
TRANSIENT = 8.0
# Transitions that a budget of gradients must leave room for; trajectories are not made longer than that.
MIN_TRANSITIONS = 10
# Steps of the longest trajectory.
MAX_LEAPFROG = 64


@dataclass(frozen=True)
class ChainResult:
    """C chains of S draws each, after adaptation, in coordinates z and unconstrained latents u, both `(C, S, D)`.

    `log_density` `(C, S)`: in z. `start`: the unconstrained latents `(C, D)` from which the chains started before
    adaptation. `tuning`: the sampler's settings. `acceptance`: mean acceptance probability by chain, `(C)`. `rate`: the
    acceptance rate by which the step size is tuned, without trajectories that end where the density is zero. `divergent`: the
    share of trajectories that diverged.
    `num_gradients`: evaluations, of all chains each, with those of the adaptation. `num_dead`: starts without density, replaced by copies of others.
    """

    z: Tensor
    u: Tensor
    log_density: Tensor
    start: Tensor
    acceptance: Tensor
    rate: float
    divergent: float
    tuning: Tuning
    num_gradients: int
    seconds: float
    num_dead: int = 0

    @property
    def num_stuck(self) -> int:
        """How many chains accepted next to nothing, or are far out, where others hardly come."""
        return int(((self.acceptance < STUCK) | self._far_out).sum())

    @property
    def is_divergent(self) -> bool:
        """Whether more trajectories diverged than should: the step is too long for some region."""
        return self.divergent > MAX_DIVERGENT

    @property
    def has_far_chains(self) -> bool:
        """Whether chains are where others hardly come: still on their way from a start, or behind a barrier."""
        return bool(self._far_out.any())

    @property
    def _far_out(self) -> Tensor:
        """By chain, whether half of its draws are below a log density that 2 % of all draws do not reach, `(C)`.

        With five independent draws a chain, as R-hat of 1.1 stands for, this happens by chance to one chain of 12,000.
        """
        if len(self.log_density) < 1 / FAR_OUT:
            own = self.log_density.amin(1)
            lowest, second = own.sort().values[:2] if len(own) > 1 else (own[0], own[0])
            return self.log_density.amax(1) < torch.where(own > lowest, lowest, second)
        level = quantiles(self.log_density.flatten(), [FAR_OUT])[0]
        return self.log_density.median(1).values < level

    @property
    def is_transient(self) -> bool:
        """Whether the first half holds draws of a density so low that the second one has none like them.

        A start far out takes a few transitions to come back. It changes the sd of all draws, and no statistic of ranks.
        """
        half = self.log_density.shape[1] // 2
        if not half:
            return False
        first, second = self.log_density[:, :half].min(), self.log_density[:, -half:].min()
        return bool(first < second - TRANSIENT)

    @property
    def r_hat(self) -> Tensor:
        """Rank-normalised split R-hat of each unconstrained latent, `(D)`."""
        return r_hat(self.u)

    @property
    def ess(self) -> Tensor:
        """Bulk effective sample size of each unconstrained latent, `(D)`."""
        return bulk_ess(self.u)

    def followed_by(self, later: ChainResult) -> ChainResult:
        """These chains and their continuation as one run."""
        first, second = self.z.shape[1], later.z.shape[1]
        return replace(
            later,
            z=torch.cat([self.z, later.z], 1),
            u=torch.cat([self.u, later.u], 1),
            log_density=torch.cat([self.log_density, later.log_density], 1),
            start=self.start,
            acceptance=(first * self.acceptance + second * later.acceptance) / (first + second),
            num_gradients=self.num_gradients + later.num_gradients,
            seconds=self.seconds + later.seconds,
            num_dead=self.num_dead,
        )

    def after(self, num: int) -> ChainResult:
        """This run without its first `num` draws."""
        return replace(
            self, z=self.z[:, num:], u=self.u[:, num:], log_density=self.log_density[:, num:]
        )


def run_chains(
    target: Callable[[Tensor], Tensor],
    transform: Coordinates | None,
    z0: Tensor,
    *,
    num_transitions: int = 30,
    tuning: Tuning | None = None,
    target_acceptance: float = 0.8,
    max_gradients: int | None = None,
    max_seconds: float | None = None,
) -> ChainResult:
    """HMC on log p(T(z)) + log|det T'(z)| with momenta N(0, I): C chains from the rows of z0, in one batch.

    With a flow T trained towards p, z is nearly standard normal and chains mix in a few transitions. Chains start near
    the posterior, so that the first part adapts step size and trajectory length and is discarded: see `adapt`.

    Args:
        target: log density of unconstrained latents, `(N, D)` -> `(N)`, differentiable; a `LogJoint`. A row where it or
            its gradient is not finite has density zero.
        transform: T, an object with `forward_and_ladj`; None for the identity.
        z0: starts `(C, D)`, such as draws of the guide's noise. Those of density zero are replaced by copies of others.
        num_transitions: draws S to keep of each chain.
        tuning: step size and length, from an earlier run, in place of adaptation.
        max_gradients, max_seconds: budgets; with either the run may end with fewer draws than S, with one at least.

    Returns:
        ChainResult: the draws; deterministic given torch's generator, unless `max_seconds` ends the run.

    Raises:
        ValueError: for starts that are no matrix, where none has a finite density, and for numbers out of range.

    References:
        Hoffman et al. 2019, NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport.
    """
    _check(z0, num_transitions, target_acceptance, max_gradients, max_seconds)
    began = time.perf_counter()
    density = PulledBack(target, transform)
    most = math.inf if max_gradients is None else max_gradients
    point, num_dead = _alive(density(z0))
    start = point.u
    if tuning is None:
        longest = MAX_LEAPFROG
        if max_gradients is not None:
            longest = max(1, min(longest, max_gradients // MIN_TRANSITIONS))
        point, tuning = adapt(
            density,
            point,
            target_acceptance=target_acceptance,
            max_leapfrog=longest,
            max_gradients=most / 2,
        )
    points: list[Point] = []
    acceptance, rates, divergent = [], [], []
    last = began
    for i in range(num_transitions):
        now = time.perf_counter()
        late = max_seconds is not None and now - began + (now - last if i else 0.0) > max_seconds
        num_leapfrog = tuning.draw_length(point.z)
        if i and (late or density.num_gradients + num_leapfrog > most):
            break
        last = now
        result = transition(density, point, tuning.step_size, num_leapfrog)
        point = result.point
        points.append(point)
        acceptance.append(result.acceptance)
        rates.append(result.rate)
        divergent.append(result.divergent)
    return ChainResult(
        z=torch.stack([p.z for p in points], 1),
        u=torch.stack([p.u for p in points], 1),
        log_density=torch.stack([p.log_density for p in points], 1),
        start=start,
        acceptance=torch.stack(acceptance).mean(0),
        rate=sum(rates) / len(rates),
        divergent=sum(divergent) / len(divergent),
        tuning=tuning,
        num_gradients=density.num_gradients,
        seconds=time.perf_counter() - began,
        num_dead=num_dead,
    )


def _alive(point: Point) -> tuple[Point, int]:
    """The starts, with random ones that have a density in place of those that have none, and how many these are."""
    alive = point.alive
    num_dead = int((~alive).sum())
    if num_dead == len(alive):
        raise ValueError(
            "z0: expected starts with a finite log density and gradient, got none; train the guide further, or check "
            "the model for values outside a support"
        )
    if not num_dead:
        return point, 0
    rows = torch.arange(len(alive), device=alive.device)
    living = rows[alive]
    rows[~alive] = living[torch.randint(len(living), (num_dead,), device=alive.device)]
    return point[rows], num_dead


def _check(
    z0: Tensor,
    num_transitions: int,
    target_acceptance: float,
    max_gradients: int | None,
    max_seconds: float | None,
) -> None:
    if z0.dim() != 2 or not z0.is_floating_point() or 0 in z0.shape:
        raise ValueError(
            f"z0: expected floating-point starts (C, D), got {z0.dtype} of shape {tuple(z0.shape)}"
        )
    if num_transitions < 1:
        raise ValueError(f"num_transitions: expected 1 or more, got {num_transitions!r}")
    if not 0 < target_acceptance < 1:
        raise ValueError(
            f"target_acceptance: expected a number between 0 and 1, got {target_acceptance!r}"
        )
    for name, value in (("max_gradients", max_gradients), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a positive number or None, got {value!r}")
