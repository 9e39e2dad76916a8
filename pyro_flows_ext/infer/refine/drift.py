"""Whether a population of chains moves away from the draws that it started from: shifts of means and sds, tested."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops import normal_scores

# Probability of a false alarm of one test of all means and sds together.
LEVEL = 0.01
# Shifts that matter: of a mean in sds, and of an sd as a factor. Significant ones below half of these are of no consequence.
MEAN_TOLERANCE, SD_TOLERANCE = 0.15, 0.15
# Chains that remember more of their start than this cannot show where they are going.
MAX_MEMORY = 0.8
# A test is conclusive where shifts of this size would be found with probability 1/2; those that matter with 85 %.
MEAN_RESOLUTION, SD_RESOLUTION = 0.12, 0.12
# A t statistic with fewer degrees of freedom has no power at the level of 100 tests together.
MIN_CHAINS = 8


@dataclass(frozen=True)
class Drift:
    """Shifts of Q quantities from one population to another one.

    Attributes:
        names: of the quantities.
        mean: shift of each mean, in sds, `(Q)`; `mean_se` its Monte Carlo error.
        log_sd: logarithm of the ratio of sds, later by earlier, `(Q)`; `log_sd_se` its error.
        memory: regression coefficient of where a chain is on where it started, `(Q)`: 0 once that is forgotten.
        threshold: standard errors beyond which one of all 2 Q shifts is found by chance in 1 % of runs.

    Shifts are those expected once chains have forgotten their starts, (shift so far) / (1 - memory). They are of normal
    scores (`ops.normal_scores`), in which skewness and heavy tails make no false alarms; for a quantity that is
    nearly normal, they are shifts of itself.
    """

    names: tuple[str, ...]
    mean: Tensor = field(repr=False)
    mean_se: Tensor = field(repr=False)
    log_sd: Tensor = field(repr=False)
    log_sd_se: Tensor = field(repr=False)
    memory: Tensor = field(repr=False)
    threshold: float

    @property
    def is_significant(self) -> Tensor:
        """Whether the mean or sd of each quantity shifts, beyond chance and by half of what matters at least: `(Q)`."""
        mean = self.mean.abs()
        log_sd, least = self.log_sd.abs(), math.log1p(SD_TOLERANCE) / 2
        moved = (mean > self.threshold * self.mean_se) & (mean > MEAN_TOLERANCE / 2)
        widened = (log_sd > self.threshold * self.log_sd_se) & (log_sd > least)
        return (moved | widened) & (self.memory <= MAX_MEMORY)

    @property
    def detected(self) -> bool:
        """Whether any quantity shifts."""
        return bool(self.is_significant.any())

    @property
    def mean_resolution(self) -> float:
        """The shift of a mean, in sds, that would be found with probability 1/2 or more, whichever quantity it were of."""
        return self._resolution(self.mean_se)

    @property
    def sd_resolution(self) -> float:
        """The change of an sd, as a share of it, that would be found with probability 1/2 or more."""
        return math.expm1(min(self._resolution(self.log_sd_se), 10.0))

    @property
    def conclusive(self) -> bool:
        """Whether shifts that matter would have been found."""
        return self.mean_resolution <= MEAN_RESOLUTION and self.sd_resolution <= SD_RESOLUTION

    @property
    def worst(self) -> int:
        """The quantity with the largest shift relative to its error."""
        score = torch.maximum(self.mean.abs() / self.mean_se, self.log_sd.abs() / self.log_sd_se)
        score = torch.where(self.is_significant, score + score.nan_to_num().max(), score)
        return int(score.nan_to_num().argmax())

    def describe(self, i: int) -> str:
        """The shifts of quantity i in words."""
        ratio = math.exp(float(self.log_sd[i]))
        return (
            f"{self.names[i]}: mean {float(self.mean[i]):+.2f} ± {float(self.mean_se[i]):.2f} sd, "
            f"sd × {ratio:.2f} ± {ratio * float(self.log_sd_se[i]):.2f}"
        )

    def __str__(self) -> str:
        if self.detected:
            count = int(self.is_significant.sum())
            return f"drift in {count} of {len(self.names)} quantities; {self.describe(self.worst)}"
        if float(self.memory.max()) > MAX_MEMORY:
            slowest = self.names[int(self.memory.argmax())]
            return f"no drift found, but the chains have hardly moved in {slowest}"
        if not self.conclusive:
            return (
                f"no drift found; too few draws to find shifts of less than {self.mean_resolution:.2f} sd in a mean "
                f"and {self.sd_resolution:.0%} in an sd"
            )
        return f"no drift (a shift of {self.mean_resolution:.2f} sd or {self.sd_resolution:.0%} of an sd would have been found)"

    def _resolution(self, se: Tensor) -> float:
        hidden = (self.memory > MAX_MEMORY) | ~se.isfinite()
        return math.inf if bool(hidden.any()) else self.threshold * float(se.max())


def drift_from(
    start: Tensor,
    draws: Tensor,
    population: Tensor,
    *,
    population_size: float | None = None,
    names: Sequence[str] | None = None,
    num_looks: int = 1,
) -> Drift:
    """Shifts from the population that chains started from to where they are, in Q quantities.

    The mean of each chain's draws is regressed on its start, whose mean is known well from many more draws of the guide: the
    common start is a control variate, and the coefficient is the chain's memory.

    Args:
        start: the chains' starts, `(C, Q)`.
        draws: their draws after adaptation, `(C, S, Q)`.
        population: draws from the distribution of the starts, `(N, Q)`, N well above C.
        population_size: its effective size, where it was resampled by weights; N by default.
        names: of the quantities.
        num_looks: how many such tests a run makes at most; the level is shared between them.

    Raises:
        ValueError: for fewer than 8 chains, and shapes that do not fit.
    """
    start, draws, population = start.double(), draws.double(), population.double()
    _check(start, draws, population)
    C, Q = start.shape
    N = len(population) if population_size is None else population_size
    x0, x, y = (normal_scores(a, population) for a in (start, draws, population))
    mean, mean_se, memory = _shift(x.mean(1), x0, y, N)
    variance, variance_se, memory_of_variance = _shift(
        (x - x.mean((0, 1))).square().mean(1), x0.square(), y.square(), N
    )
    before = y.square().mean(0)
    after = (before + variance).clamp(min=0.01)
    scale = after.sqrt()  # sds of the later population
    return Drift(
        names=_names(names, Q),
        mean=mean / scale,
        mean_se=mean_se / scale,
        log_sd=(after / before).log() / 2,
        log_sd_se=variance_se / after / 2,
        memory=torch.maximum(memory, memory_of_variance),
        threshold=_threshold(C - 1, 2 * Q * num_looks),
    )


def drift_within(draws: Tensor, *, names: Sequence[str] | None = None, num_looks: int = 1) -> Drift:
    """Shifts between the two halves of a run, chain by chain: `(C, S, Q)`, Q quantities; see `drift_from`.

    The error is that of the paired differences, so that what a chain keeps from half to half cancels. `memory` is zero.

    A run of a single draw has no halves, and unknown shifts: the errors are infinite.

    Raises:
        ValueError: for fewer than 8 chains.
    """
    if draws.dim() != 3 or len(draws) < MIN_CHAINS or not draws.shape[1]:
        raise ValueError(
            f"draws: expected (C, S, Q) with {MIN_CHAINS} chains or more, got {tuple(draws.shape)}"
        )
    C, S, Q = draws.shape
    if S < 2:
        zero, unknown = draws.new_zeros(Q), draws.new_full((Q,), math.inf)
        threshold = _threshold(C - 1, 2 * Q * num_looks)
        return Drift(_names(names, Q), zero, unknown, zero, unknown, zero, threshold)
    x = normal_scores(draws.double())
    first, second = x[:, : S // 2], x[:, -(S // 2) :]
    mean = second.mean(1) - first.mean(1)
    v1, v2 = ((h - h.mean((0, 1))).square() for h in (first, second))
    before, after = _positive(v1.mean((0, 1))), _positive(v2.mean((0, 1)))
    relative = v2.mean(1) / after - v1.mean(1) / before
    root = math.sqrt(C)
    return Drift(
        names=_names(names, Q),
        mean=mean.mean(0),
        mean_se=_positive(mean.std(0)) / root,
        log_sd=(after / before).log() / 2,
        log_sd_se=_positive(relative.std(0)) / root / 2,
        memory=torch.zeros_like(after),
        threshold=_threshold(C - 1, 2 * Q * num_looks),
    )


def _shift(
    chains: Tensor, start: Tensor, population: Tensor, size: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a quantity's mean by chain `(C, Q)`: its expected shift from the population's, the error, and the memory."""
    x0 = start - start.mean(0)
    varies = x0.square().sum(0)
    memory = (x0 * chains).sum(0) / torch.where(varies > 0, varies, 1.0)
    memory = memory.clamp(0.0, 1.0)
    mean = population.mean(0)
    rest = chains - memory * (start - mean)
    left = (1 - memory).clamp(min=1 - MAX_MEMORY)
    se_population = population.var(0) / size * (1 - memory).square()
    se = (rest.var(0) / len(chains) + se_population).sqrt()
    return (rest.mean(0) - mean) / left, _positive(se) / left, memory


def _threshold(df: int, num_tests: int) -> float:
    """Bonferroni's two-sided quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - LEVEL / num_tests / 2))


def _positive(x: Tensor) -> Tensor:
    """Without zeros, by which quantities that are constant would be divided."""
    return x.clamp(min=1e-12)


def _names(names: Sequence[str] | None, Q: int) -> tuple[str, ...]:
    names = tuple(f"u[{i}]" for i in range(Q)) if names is None else tuple(names)
    if len(names) != Q:
        raise ValueError(f"names: expected {Q}, one for each quantity, got {len(names)}")
    return names


def _check(start: Tensor, draws: Tensor, population: Tensor) -> None:
    C, Q = start.shape if start.dim() == 2 else (0, 0)
    if C < MIN_CHAINS or draws.dim() != 3 or population.dim() != 2:
        raise ValueError(
            f"expected start (C, Q), draws (C, S, Q) and population (N, Q) with C >= {MIN_CHAINS}, got "
            f"{tuple(start.shape)}, {tuple(draws.shape)} and {tuple(population.shape)}"
        )
    if draws.shape[0] != C or draws.shape[2] != Q or population.shape[1] != Q:
        raise ValueError(
            f"expected {C} chains and {Q} quantities throughout, got start {tuple(start.shape)}, draws "
            f"{tuple(draws.shape)} and population {tuple(population.shape)}"
        )
