"""The search for a Gaussian near a density: which recipes in which order, and how much of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batch_and_match import BatchAndMatch, truncated_elbo
from .climb import Path, climb
from .gaussian import DenseGaussian, Gaussian, LowRankGaussian
from .laplace import laplace
from .modes import Mode, distinct_modes
from .natural_gradient import natural_gradient
from .pathfinder import pathfinder
from .stochastic_gradient import stochastic_gradient
from .target import MeasuredTarget, Target

# Ascents from the start and from points around it, as far away as Stan's initial values.
NUM_CLIMBS, SPREAD, CLIMB_EVALUATIONS = 8, 2.0, 120
# Paths whose Gaussians are tried: that of the start and the highest others.
NUM_PATHS = 3
NUM_BATCHES = 40
# Natural-gradient steps of the first run, and their draws. A longer run follows one that gained more than WORTHWHILE nats.
NUM_STEPS, STEP_DRAWS, MAX_RUNS, WORTHWHILE = 30, 64, 5, 0.1
# Draws behind the ELBO of a candidate: its standard error is then some .04 sd of the log weights.
NUM_DRAWS = 512
# Log weights with this variance cost half as many nats: steps would gain less than that.
LEVEL_VARIANCE = 0.02
# Above so many latents the decompositions of dense covariances, D³ each, take longer than most gradients, and above so many
# a dense scale has more entries than stochastic gradients learn in a short run: a diagonal is learned.
MAX_DENSE, MAX_FULL_RANK = 600, 150
NUM_DIAGONAL_STEPS, DIAGONAL_DRAWS = 600, 32
# The mean-field run of many latents: its gradients have little noise near the optimum, so that a few draws do.
MEAN_FIELD_STEPS, MEAN_FIELD_DRAWS, MEAN_FIELD_RATE, MEAN_FIELD_SCALE = 200, 8, 0.1, 0.1
# Fewer steps than this only add noise.
LEAST_STEPS = 10
DEFAULT_BUDGET = 20.0


@dataclass(frozen=True)
class WarmStart:
    """A Gaussian near a posterior, in unconstrained space.

    Attributes:
        name: the recipe that `gaussian` came from.
        elbos: recipe -> ELBO of its Gaussian in nats, over common draws; of the Gaussian restricted to where the model
            has a density, and -inf if that is less than half of it.
        gaussian: the Gaussian of the highest ELBO.
        modes: the distinct maxima that ascents from the start and from points around it found, by descending mass.
    """

    name: str
    elbos: dict[str, float]
    gaussian: Gaussian = field(repr=False)
    modes: list[Mode] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Plan:
    """How much of each recipe the budget allows."""

    num_climbs: int
    climb_evaluations: int
    num_draws: int
    num_starts: int
    num_batches: int
    step_draws: int
    num_steps: int
    with_hessian: bool
    with_curvature: bool

    @staticmethod
    def make(target: MeasuredTarget, budget: float) -> Plan:
        """The full plan where gradients are cheap, as in most models; otherwise shares of the budget in seconds."""
        D, seconds = target.dim, target.seconds
        num_draws = 32 if D <= 16 else 64 if D <= 64 else 128
        climbs = max(
            (n for n in (1, 2, 4, NUM_CLIMBS) if CLIMB_EVALUATIONS * seconds(n) <= budget / 5),
            default=1,
        )
        starts = 2 if NUM_BATCHES * seconds(2 * num_draws) <= 0.4 * budget else 1
        batches = int(0.4 * budget / seconds(starts * num_draws))
        steps = int(0.4 * budget / seconds(STEP_DRAWS))
        # Second derivatives take some three times as long as first ones.
        hessian = 3 * seconds(D) if D <= MAX_DENSE else math.inf
        return Plan(
            num_climbs=climbs,
            climb_evaluations=max(30, min(CLIMB_EVALUATIONS, int(budget / 5 / seconds(climbs)))),
            num_draws=num_draws,
            num_starts=starts,
            num_batches=max(4, min(NUM_BATCHES, batches)),
            step_draws=STEP_DRAWS,
            num_steps=min(NUM_STEPS, steps),
            with_hessian=hessian <= 0.1 * budget,
            with_curvature=hessian <= 0.4 * budget,
        )


def find_gaussian(
    target: Target,
    start: Gaussian,
    *,
    overdispersed: Tensor | None = None,
    budget: float = DEFAULT_BUDGET,
) -> WarmStart:
    """A Gaussian of high ELBO near a log density on ℝᴰ, and the density's modes.

    L-BFGS ascents, all in one batch, from the start and from points around it; the best Gaussian along each path
    (Pathfinder) and at its end (Laplace); from the best of these and from N(start, I) batch and match; from the best so far
    natural-gradient steps, unless its weights are level already. The highest ELBO wins. No recipe does everywhere: modes of
    funnels lie where there is no mass, and from N(start, I) nothing reaches badly scaled posteriors.

    Args:
        target: the log density, as `LogJoint`. If each call draws its own part of the data, only gradient runs are made.
        start: a Gaussian at the guide's first location, in the dtype of the target.
        overdispersed: further points `(N, D)` to climb from, such as draws of the prior; by default points of up to 2 around
            the start in each coordinate.
        budget: seconds that evaluations may take. Models with a gradient of 64 particles in less than about .05 s, which
            are most, stay far below 20 s, and their results do not depend on timings.

    Returns:
        The Gaussian, in the dtype of `start`, what each recipe was worth, and the modes.

    Raises:
        ValueError: if no candidate has a finite ELBO.

    Example:
        >>> log_joint = LogJoint(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1)))
        >>> start = LowRankGaussian.isotropic(torch.zeros(log_joint.dim), 0.1)
        >>> find_gaussian(log_joint, start).gaussian.loc.shape
        torch.Size([2])
    """
    search = _Search(MeasuredTarget(target, start.loc), start, overdispersed, budget)
    search.run()
    name, best = search.best()
    return WarmStart(name, search.elbos, best.to(start.loc), search.modes)


class _Search:
    """Candidates and their ELBOs over the same draws, in float64."""

    def __init__(
        self, target: MeasuredTarget, start: Gaussian, overdispersed: Tensor | None, budget: float
    ):
        self.target, self.budget, self.overdispersed = target, budget, overdispersed
        self.start = start.to(start.loc.double())
        self.noise = torch.randn(NUM_DRAWS, target.dim).to(self.start.loc)
        self.elbos: dict[str, float] = {}
        self.log_weights: dict[str, Tensor] = {}
        self.found: dict[str, Gaussian] = {}
        self.modes: list[Mode] = []
        self.preferred: str | None = None

    def add(self, name: str, candidate: Gaussian | None) -> None:
        """Records a candidate with its ELBO and its log weights."""
        if candidate is None:
            return
        log_weights = self.target(candidate.draw(self.noise)) - candidate.log_prob_of(self.noise)
        self.found[name] = candidate
        self.elbos[name] = float(truncated_elbo(log_weights))
        self.log_weights[name] = log_weights

    def run(self) -> None:
        self.add("start", self.start)
        if self.target.is_stochastic:
            self._run_gradients()
        else:
            self.target.measure(self.start.loc, STEP_DRAWS)
            self.plan = Plan.make(self.target, self.budget)
            self._climb()
            if self.target.dim > MAX_FULL_RANK:
                self._run_many_latents()
            else:
                if not self._is_level():
                    self._batch_and_match()
                self._polish()
        if self.elbos[self.best()[0]] == -math.inf:
            raise ValueError(
                "find_gaussian: expected a log density that is finite near the start, got no candidate with a finite ELBO; "
                "check the model for values outside a support, or give init_loc_fn a point and init_scale a scale at which its "
                "log joint is finite"
            ) from self.target.error

    def best(self) -> tuple[str, Gaussian]:
        """The candidate of the highest ELBO, and its name; the last one where ELBOs are those of different parts of the data."""
        if self.preferred is not None:
            return self.preferred, self.found[self.preferred]
        names = [name for name in self.elbos if self.elbos[name] > -math.inf] or list(self.elbos)
        name = names[-1] if self.target.is_stochastic else max(names, key=self.elbos.__getitem__)
        return name, self.found[name]

    # --- recipes ---

    def _climb(self) -> None:
        paths = climb(
            self.target.value_and_gradient,
            self._starts(),
            max_evaluations=self.plan.climb_evaluations,
        )
        self.modes, gaussians = distinct_modes(
            self.target, paths, with_hessian=self.plan.with_hessian
        )
        for i, path in enumerate(self._promising(paths)):
            self.add(f"pathfinder {i}", pathfinder(self.target, path))
            if not self.modes and self.plan.with_hessian:
                self.add(f"laplace {i}", laplace(self.target.hessian(path.end), path.end))
        for i, gaussian in enumerate(gaussians[:NUM_PATHS]):
            self.add(f"mode {i}", gaussian)

    def _starts(self) -> Tensor:
        loc, others = self.start.loc, self.plan.num_climbs - 1
        spread = SPREAD * (2 * torch.rand(others, len(loc)).to(loc) - 1)
        starts = torch.cat([loc.unsqueeze(0), loc + spread])
        if self.overdispersed is not None:
            given = self.overdispersed.to(loc)[:others]
            starts[1 : 1 + len(given)] = given
        return starts

    def _promising(self, paths: list[Path]) -> list[Path]:
        """The path of the start, and the highest ones that end elsewhere."""
        paths = [path for path in paths if len(path.points) > 1]
        chosen = paths[:1]
        for path in sorted(paths[1:], key=lambda p: -float(p.values[-1])):
            apart = [abs(float(path.values[-1] - other.values[-1])) > 1e-3 for other in chosen]
            if len(chosen) < NUM_PATHS and all(apart):
                chosen.append(path)
        return chosen

    def _batch_and_match(self) -> None:
        plan = self.plan
        name, best = self.best()
        unit = LowRankGaussian.isotropic(self.start.loc)
        starts = {name: best, "unit scale": unit}
        if name == "start":
            starts = {"unit scale": unit, "start": self.start}
        chosen = dict(list(starts.items())[: plan.num_starts])
        run = BatchAndMatch(self.target.value_and_gradient, list(chosen.values()), plan.num_draws)
        for origin, gaussian in zip(chosen, run.run(plan.num_batches), strict=True):
            self.add(f"batch and match from {origin}", gaussian)

    def _polish(self) -> None:
        gradient, plan = self.target.value_and_gradient, self.plan
        if plan.num_steps < LEAST_STEPS:
            return
        for i in range(MAX_RUNS):
            name, best = self.best()
            if self.elbos[name] == -math.inf or self._is_level():
                return
            steps = plan.num_steps * (1 if i == 0 else 2)
            polished, _ = natural_gradient(
                gradient, best, num_steps=steps, num_draws=plan.step_draws
            )
            run = f"natural gradient {i + 1}"
            self.add(run, polished)
            gain, noise = self._gain(run, name)
            # The steps ascend the ELBO over many more draws than it is judged by here: a tie is theirs.
            if gain > -noise:
                self.preferred = run
            if not gain > WORTHWHILE:
                return

    def _is_level(self) -> bool:
        """Whether the weights of the best candidate leave next to nothing to gain."""
        return bool(self.log_weights[self.best()[0]].var() < LEVEL_VARIANCE)

    def _gain(self, name: str, other: str) -> tuple[float, float]:
        """How much the ELBO of one candidate is above that of another, and the standard error over common draws."""
        difference = self.log_weights[name] - self.log_weights[other]
        difference = difference[difference.isfinite()]
        gain = self.elbos[name] - self.elbos[other]
        if len(difference) < 2:
            return gain, 0.0
        return gain, float(difference.std()) / math.sqrt(len(difference))

    def _run_many_latents(self) -> None:
        """A mean-field Gaussian, and the curvature at its mean, once, where that can be afforded.

        Modes of hierarchical models with hundreds of latents lie far from the mass, and batches smaller than the dimension do not
        determine a covariance.
        """
        plan, target = self.plan, self.target
        affordable = 0.2 * self.budget / target.seconds(MEAN_FIELD_DRAWS)
        if (steps := min(MEAN_FIELD_STEPS, int(affordable))) >= LEAST_STEPS:
            mean_field = stochastic_gradient(
                target.value_and_gradient,
                LowRankGaussian.isotropic(self.start.loc),
                full_rank=False,
                num_steps=steps,
                num_draws=MEAN_FIELD_DRAWS,
                lr=MEAN_FIELD_RATE,
                initial_scale=MEAN_FIELD_SCALE,
            )
            self.add("mean-field", mean_field)
        if plan.with_curvature:
            name, best = self.best()
            self.add(f"curvature of {name}", laplace(target.hessian(best.loc), best.loc))
        elif target.dim <= MAX_DENSE:
            self._batch_and_match()
        else:
            self._fit_diagonal()

    def _fit_diagonal(self) -> None:
        """A diagonal scale in the coordinates of the best candidate so far."""
        steps = int(0.6 * self.budget / self.target.seconds(DIAGONAL_DRAWS))
        if steps < LEAST_STEPS:
            return
        diagonal = stochastic_gradient(
            self.target.value_and_gradient,
            self.best()[1],
            full_rank=False,
            num_steps=min(NUM_DIAGONAL_STEPS, steps),
            num_draws=DIAGONAL_DRAWS,
        )
        self.add("diagonal", diagonal)

    def _run_gradients(self) -> None:
        gradient = self.target.value_and_gradient
        # In the model's own coordinates: in those of a narrow start the mean could not go far.
        unit = LowRankGaussian.isotropic(self.start.loc)
        mean_field = stochastic_gradient(
            gradient, unit, full_rank=False, num_steps=400, initial_scale=0.1
        )
        self.add("mean-field", mean_field)
        full_rank = self.target.dim <= MAX_FULL_RANK
        self.add(
            "full-rank" if full_rank else "diagonal",
            stochastic_gradient(gradient, self.best()[1], full_rank=full_rank, num_steps=600),
        )


__all__ = ["DenseGaussian", "LowRankGaussian", "Plan", "WarmStart", "find_gaussian"]
