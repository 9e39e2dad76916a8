"""Step size and trajectory length of many chains, adapted in a few transitions by what all chains have in common.

With a hundred chains, one transition gives the acceptance rate to some .02 and the autocorrelation of every coordinate at
every point of the trajectory to .09. Both settings follow from a handful of transitions, where the stochastic gradients of
ChEES (Hoffman, Radul & Sountsov 2021) take hundreds. As in SNAPER (Sountsov & Hoffman 2021), the slowest direction
decides, since a sum over all coordinates hides one that is slow among many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .energy import Point, PulledBack
from .leapfrog import divergent_share, finite_rate, transition

# A quarter of the period of a standard normal target, which is what good coordinates make of any: from there on a trajectory is
# independent of its start.
QUARTER_PERIOD = math.pi / 2
# Transitions for the step size at most, and for each pilot of the trajectory length.
NUM_STEP_SIZE, NUM_PILOT = 8, 2
# The step size is settled where the acceptance rate is this close to its target.
CLOSE = 0.08
# The largest share of divergent trajectories (see `divergent_share`). Regressions have none in 10,000, centred hierarchical
# models and half-Cauchy scales 3 % at an acceptance rate of .8; on a banana chains with 8 % had an sd 40 % too small. A limit of
# .5 % takes 2 to 4 times as many gradients on the former, which are right without it.
MAX_DIVERGENT = 0.04
# Directions whose speed is estimated beside that of every latent.
NUM_DIRECTIONS = 3
# A pilot whose best length lies in its last tenth has been too short.
AT_THE_END = 0.9
# So has one whose best length leaves this autocorrelation: the slowest direction may gain more from a longer one than the
# faster ones lose, which come round to their start at half a period.
CORRELATED = 0.5
# Pilots end, too, when twice the length gains less than this factor.
MIN_GAIN = 1.1


@dataclass(frozen=True)
class Tuning:
    """Settings of the transitions: leapfrog step size and number of steps, `shortest` to `num_leapfrog`, uniformly.

    `shortest=None`: always `num_leapfrog`. Random lengths keep fast directions, which come round to their start at half
    a period, from doing so at every transition.
    """

    step_size: float
    num_leapfrog: int
    shortest: int | None = None

    def draw_length(self, like: Tensor) -> int:
        """The number of steps of one transition, by torch's generator of the device of `like`."""
        if self.shortest is None:
            return self.num_leapfrog
        return int(torch.randint(self.shortest, self.num_leapfrog + 1, (), device=like.device))


@dataclass(frozen=True)
class Length:
    """A choice of trajectory lengths (see `Tuning`), the slowest direction's autocorrelation from draw to draw, and
    its effective draws per gradient and chain."""

    num_leapfrog: int
    shortest: int | None
    correlation: float
    worth: float


def adapt(
    density: PulledBack,
    start: Point,
    *,
    target_acceptance: float = 0.8,
    max_leapfrog: int = 64,
    max_gradients: float = math.inf,
) -> tuple[Point, Tuning]:
    """Runs chains from `start` while adapting, at `max_gradients` gradients or fewer; the chains' end and the settings.

    First the step size, at trajectories of a quarter period; then pilots of growing length, until the most efficient
    length lies within.
    """
    D = start.z.shape[-1]
    most = density.num_gradients + max_gradients
    point = start
    tuning = _with_length(Tuning(D**-0.25, 1), QUARTER_PERIOD, max_leapfrog)
    for i in range(NUM_STEP_SIZE):
        if density.num_gradients + tuning.num_leapfrog > most:
            return point, tuning
        result = transition(density, point, tuning.step_size, tuning.num_leapfrog)
        point, rate = result.point, result.rate
        step_size = tuned_step_size(tuning.step_size, rate, target_acceptance)
        tuning = _with_length(replace(tuning, step_size=step_size), QUARTER_PERIOD, max_leapfrog)
        if i and abs(rate - target_acceptance) < CLOSE:
            break
    length, least_worth = min(2 * tuning.num_leapfrog, max_leapfrog), 0.0
    while density.num_gradients + NUM_PILOT * length <= most:
        pilots = []
        for _ in range(NUM_PILOT):
            pilots.append(transition(density, point, tuning.step_size, length))
            point = pilots[-1].point
        acceptance = torch.cat([p.path_acceptance for p in pilots], 1)
        best = best_length(slow_quantities([p.path for p in pilots]), acceptance.mean(1))
        ends = acceptance[best.num_leapfrog - 1]
        rate = float(finite_rate(ends[None]))
        step_size = tuned_step_size(tuning.step_size, rate, target_acceptance, 0.5)
        tuning = Tuning(tuning.step_size, best.num_leapfrog, best.shortest)
        share = float(divergent_share(ends))
        tuning = without_divergences(tuning, step_size, share, max_leapfrog)
        within = best.num_leapfrog <= AT_THE_END * length and best.correlation < CORRELATED
        if within or best.worth < MIN_GAIN * least_worth or length == max_leapfrog:
            break
        least_worth = best.worth
        length = min(2 * length, max_leapfrog)
    return point, tuning


def without_divergences(tuning: Tuning, step_size: float, share: float, longest: int) -> Tuning:
    """The settings at `step_size`, or at a shorter one where a larger share of trajectories diverges than `MAX_DIVERGENT`.

    Trajectories keep their length. The share falls with a high power of the step size, which differs between models: the
    fourth root overshoots and undershoots less than twofold on bananas and funnels.
    """
    if share <= MAX_DIVERGENT:
        # No growth back to where trajectories begin to diverge.
        if share > MAX_DIVERGENT / 4:
            step_size = min(step_size, tuning.step_size)
        return replace(tuning, step_size=step_size)
    factor = max((MAX_DIVERGENT / share) ** 0.25, 0.5)
    shorter = min(step_size, factor * tuning.step_size)

    def longer(num: int) -> int:
        return min(math.ceil(num * tuning.step_size / shorter), longest)

    shortest = None if tuning.shortest is None else longer(tuning.shortest)
    return Tuning(shorter, longer(tuning.num_leapfrog), shortest)


def tuned_step_size(step_size: float, rate: float, target: float, gain: float = 1.0) -> float:
    """The step size at which the acceptance rate would be `target`, given that it is `rate` at `step_size`.

    In a long trajectory the energy error is about N(σ²/2, σ²) with σ proportional to the square of the step size, and the
    acceptance rate is 2 Φ(-σ / 2) (Neal 2011, MCMC using Hamiltonian dynamics, section 4.4; Beskos et al. 2013, Optimal
    tuning of the hybrid Monte Carlo algorithm). By a factor of two at most, as the rule is rough far from the target.
    """
    factor = (_error_scale(target) / _error_scale(min(max(rate, 0.01), 0.99))) ** (gain / 2)
    return step_size * min(max(factor, 0.5), 2.0)


def slow_quantities(paths: Sequence[Tensor]) -> Tensor:
    """Of paths z and u `(L + 1, C, 2 D)` each: the coordinates of u and the widest directions of z, `(L + 1, N, K)`.

    With momenta of unit mass the widest directions are the slowest ones, as in SNAPER. Trajectories that diverge are
    left out.
    """
    path = torch.cat(list(paths), 1).double()
    path = path[:, path.isfinite().all(-1).all(0)]
    z, u = path.chunk(2, -1)
    flat = z.flatten(0, 1)
    if len(flat) < 2:
        return u
    flat = flat - flat.mean(0)
    _, Q = torch.linalg.eigh(flat.mT @ flat)  # ascending
    return torch.cat([u, z @ Q[:, -NUM_DIRECTIONS:]], -1)


def best_length(path: Tensor, rates: Tensor) -> Length:
    """The number of leapfrog steps with the most effective draws per gradient for the slowest direction.

    `path` `(L + 1, N, K)`: K quantities along N trajectories, stationary; `rates` `(L)`: acceptance rates of trajectories that
    end at each step. The correlation ρ(l) of the ends of a trajectory of l steps is estimated over the N, for each quantity
    and its square. Draws accepted at the rate a(l) have autocorrelation r(l) = 1 - a (1 - ρ), on average over the lengths
    l of a choice, and each counts as (1 - r) / (1 + r) independent ones. Choices are b steps, and between b / 2 and b.
    """
    if path.shape[1] < 2:
        return Length(1, None, 1.0, 0.0)
    centred = path - path.mean((0, 1))
    rho = torch.cat([_correlation(centred), _correlation(centred.square())], -1)
    # The largest of M estimates of zero is some sqrt(2 log M) standard errors; those of atanh ρ are equal (Fisher 1915).
    noise = math.sqrt(2 * math.log(rho.shape[-1]) / path.shape[1])
    rho = torch.tanh(torch.atanh(rho.clamp(-0.999, 0.999)) - noise)
    r = 1 - rates.clamp(min=0.01).unsqueeze(-1) * (1 - rho.clamp(min=-0.5))
    choices = []
    for b in range(1, len(path)):
        for a in (b, (b + 1) // 2):
            slowest = float(r[a - 1 : b].mean(0).max())
            worth = (1 - slowest) / (1 + slowest) / ((a + b) / 2)
            choices.append(Length(b, None if a == b else a, slowest, worth))
    return max(choices, key=lambda choice: choice.worth)


def _correlation(x: Tensor) -> Tensor:
    """Correlations `(L, K)` over N of the first of x `(L + 1, N, K)` with each other one; -1 where x does not vary."""
    x = x - x.mean(1, keepdim=True)
    scale = x.square().mean(1).sqrt()
    product = (x[0] * x[1:]).mean(1)
    scales = scale[0] * scale[1:]
    usable = scales > 0
    return torch.where(usable, product / torch.where(usable, scales, 1.0), -1.0)


def _with_length(tuning: Tuning, length: float, max_leapfrog: int) -> Tuning:
    num_leapfrog = min(max(round(length / tuning.step_size), 1), max_leapfrog)
    return replace(tuning, num_leapfrog=num_leapfrog)


def _error_scale(rate: float) -> float:
    """σ with 2 Φ(-σ / 2) = rate."""
    return -2 * float(torch.special.ndtri(torch.tensor(rate / 2, dtype=torch.float64)))
