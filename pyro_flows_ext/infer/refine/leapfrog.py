"""Hamiltonian transitions of many chains at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .energy import Point, PulledBack

# Step sizes vary by chain and transition as ε U^(1/4), U uniform on (0, 1), times 5/4 so that their mean is ε: no trajectory
# length is periodic for all chains, and 1 % of the steps are shorter than .4 ε, which frees chains from narrow regions.
JITTER_POWER = 0.25
# Nats of energy that a divergent trajectory loses. Stan's limit is 1000, for trajectories of hundreds of steps; these have a few.
DIVERGENT = 10.0


@dataclass(frozen=True)
class Transition:
    """One transition of C chains: where they are now, and the mean acceptance probability of each, `(C)`.

    Of the trajectories, accepted or not: `path`, z and u at each step, `(L + 1, C, 2 D)`, the start first; `path_acceptance`,
    the acceptance probability of a trajectory that ended at that step, `(L, C)`.
    """

    point: Point
    acceptance: Tensor
    path: Tensor
    path_acceptance: Tensor

    @property
    def rate(self) -> float:
        """The acceptance rate by which the step size is tuned: see `finite_rate`."""
        return float(finite_rate(self.path_acceptance[-1:]))

    @property
    def divergent(self) -> float:
        """The share of divergent trajectories: see `divergent_share`."""
        return float(divergent_share(self.acceptance))


def divergent_share(acceptance: Tensor) -> Tensor:
    """The share of acceptance probabilities below e⁻¹⁰, those of proposals without density left out.

    At a step that is right everywhere energies are off by a nat or two. Larger errors come from regions that are too narrow
    for the step, which chains then hardly enter and hardly leave, as in the tails of a banana or the neck of a funnel.
    """
    return ((acceptance > 0) & (acceptance < math.exp(-DIVERGENT))).double().mean()


def finite_rate(acceptance: Tensor) -> Tensor:
    """Mean acceptance probabilities `(L)` of `(L, C)` over the rows that do not end without density.

    A wall of the density rejects as many trajectories at any step size. Where nine in ten end so, the mean of all.
    """
    alive = acceptance > 0
    num = alive.sum(-1)
    return torch.where(
        10 * num >= acceptance.shape[-1],
        acceptance.sum(-1) / num.clamp(min=1),
        acceptance.mean(-1),
    )


def transition(
    density: PulledBack, start: Point, step_size: float, num_leapfrog: int
) -> Transition:
    """L leapfrog steps of Hamiltonian dynamics with momenta from N(0, I), accepted or rejected row by row.

    The log density is invariant (Duane, Kennedy, Pendleton & Roweth 1987). A row that ends where the density is zero is
    rejected. Cost: L gradients, each of all chains at once.
    """
    C = len(start.z)
    momentum = torch.randn_like(start.z)
    uniform = torch.rand(2, C, 1, dtype=start.z.dtype, device=start.z.device)
    step = (1 + JITTER_POWER) * step_size * uniform[0] ** JITTER_POWER
    before = start.log_density - momentum.square().sum(-1) / 2
    point, path, energies = start, [torch.cat([start.z, start.u], -1)], []
    for _ in range(num_leapfrog):
        half = momentum + step / 2 * point.gradient
        point = density(point.z + step * half)
        momentum = half + step / 2 * point.gradient
        path.append(torch.cat([point.z, point.u], -1))
        energies.append(point.log_density - momentum.square().sum(-1) / 2)
    change = torch.stack(energies) - before
    change = torch.where(change.isfinite(), change, -torch.inf)
    # Zero stands for a proposal without density alone: the worst of the others have e⁻⁸⁰, which float32 represents.
    path_acceptance = torch.where(change > -torch.inf, change.clamp(-80.0, 0.0), change).exp()
    acceptance = path_acceptance[-1]
    moved = uniform[1, :, 0] < acceptance
    return Transition(start.where(moved, point), acceptance, torch.stack(path), path_acceptance)
