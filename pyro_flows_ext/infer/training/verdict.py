"""The verdict on a guide: its weights, chains that start from its draws, and modes that it does not cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops import pareto_smooth
from ...programs import LogJoint
from ..importance import ImportanceResult
from ..refine import RefineResult, Start, refine_density, uncovered, verify
from ..refine.refine import latent_names
from ..warm_start import Mode
from .posterior import Posterior

# k-hat up to which weighted draws can be relied on (Vehtari et al. 2024).
MAX_K_HAT = 0.7
# Gradients, of all chains at once, for a check of drift and for the first attempt to refine; the budget doubles.
VERIFY_GRADIENTS, REFINE_GRADIENTS, MAX_GRADIENTS = 160, 600, 2400
# Gradients of all attempts to refine after which more training and longer chains are not tried.
TOTAL_GRADIENTS = 1500
# Effective draws at which chains stop: means to .03 sd.
CHAIN_ESS = 1000.0
# Below these effective shares the guide's draws are too few places for chains to start from, before any training and after
# some: a hundred steps cost less than chains that do not mix.
LEAST_EFFICIENCY_AT_START, LEAST_EFFICIENCY = 0.05, 0.02
# Rounds whose draws were too few places. After that many chains start all the same: more training may not make it better.
MAX_DECLINED = 4
# Largest Monte Carlo error of an sd, relative; a normal latent has .022 from 1000 draws. Where it is larger, so many times as
# many draws are made; an sd that is known no better then is one of a latent whose tails have no variance, or nearly none.
MAX_SD_ERROR, MORE_DRAWS = 0.05, 2
# From this Pareto shape of a tail on the latent has no variance: its sd is not a number that could be known.
NO_VARIANCE = 0.5
# Below this effective share chains run twice as long.
FAIR_EFFICIENCY = 0.2
# A draw of the guide that carries this share of all weight, and weighs more than any draw of the chains by a factor of e,
# lies where the chains have not been: draws of the posterior prefer large weights.
LARGE_SHARE, MARGIN = 0.1, 1.0


@dataclass
class TrustCheck:
    """Decides after each round whether the guide's draws, or chains that start from them, are the posterior's.

    Attributes:
        posterior: the guide's draws.
        target_ess: the effective share of draws at which weights are trusted.
        refine: whether chains may replace the guide's draws.
        num_draws: draws weighed at a time.
        modes: modes of the posterior known from the warm start.
        findings: reasons not to trust draws that weights and chains agree on: modes that are not covered, sds that are
            not known. More steps do not help against them.
        caveats: what to mind where the draws are trusted: latents whose tails have no variance.
    """

    posterior: Posterior
    target_ess: float
    refine: bool
    num_draws: int
    modes: Sequence[Mode] = ()
    importance: ImportanceResult | None = None
    refined: RefineResult | None = None
    findings: list[str] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    budget: int = REFINE_GRADIENTS
    num_gradients: int = 0
    num_declined: int = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether chains have had their budget, attempt after attempt, and did not mix."""
        return self.num_gradients >= TOTAL_GRADIENTS

    def weigh(self) -> ImportanceResult:
        """Fresh draws with their weights."""
        self.importance = self.posterior.weigh(self.num_draws)
        return self.importance

    def is_good(self, result: ImportanceResult) -> bool:
        """Whether weights are even enough to be trusted by themselves."""
        return result.efficiency >= self.target_ess and result.k_hat < MAX_K_HAT

    def is_trusted(
        self, result: ImportanceResult, *, first: bool = False, last: bool = False
    ) -> bool:
        """Whether draws can be trusted now: good weights, twice, and chains without drift; else chains that mix.

        `first`: before any training. `last`: no further round follows, so that chains get a full budget.
        """
        if self.is_good(result) and self.is_good(self.weigh()):
            target, start = self.posterior.start(first)
            checked = verify(target, start, max_gradients=VERIFY_GRADIENTS)
            # Chains that hardly move show no drift either: such a run is not conclusive.
            if checked.is_without_drift:
                self.refined = None
                return self._has_no_findings(target, start)
            if not self.refine:
                return False
            self.refined = refine_density(
                target, start, max_gradients=MAX_GRADIENTS, target_ess=CHAIN_ESS, previous=checked
            )
            return self.refined.mixed and self._has_no_findings(target, start)
        least = LEAST_EFFICIENCY_AT_START if first else LEAST_EFFICIENCY
        if not self.refine:
            return False
        if not last and result.efficiency < least and self.num_declined < MAX_DECLINED:
            self.num_declined += 1
            return False
        target, start = self.posterior.start(first)
        budget = MAX_GRADIENTS if last else self.budget
        self.budget = min(2 * self.budget, MAX_GRADIENTS)
        # Chains from few places need longer to forget them.
        ess = CHAIN_ESS if result.efficiency >= FAIR_EFFICIENCY else 2 * CHAIN_ESS
        self.refined = refine_density(
            target, start, max_gradients=budget, target_ess=ess, gives_up=first
        )
        self.num_gradients += self.refined.num_gradients
        return self.refined.mixed and self._has_no_findings(target, start)

    def _has_no_findings(self, target: LogJoint, start: Start) -> bool:
        imprecise = self._imprecise()
        if imprecise:
            self._add_draws(target, start)
            imprecise = self._imprecise()
        self.findings = [*self._unvisited(), *self._uncovered_modes(), *imprecise]
        return not self.findings

    def _add_draws(self, target: LogJoint, start: Start) -> None:
        """More draws for sds that are not known well enough: of the chains that gave them, else of the guide."""
        if self.refined is None:
            self.importance = self.posterior.weigh(MORE_DRAWS * self.num_draws)
            return
        longer = refine_density(
            target,
            start,
            num_chains=len(self.refined.chains.u),
            max_gradients=MAX_GRADIENTS,
            target_ess=MORE_DRAWS * self.refined.min_ess,
            previous=self.refined,
        )
        if longer.mixed:
            self.refined = longer

    def _imprecise(self) -> list[str]:
        """Sentences on the latents whose sd is not known well enough, though they have one."""
        found: list[str] = []
        self.caveats = []
        for name, errors in self._sd_errors().items():
            imprecise = ~(errors <= MAX_SD_ERROR)
            if not bool(imprecise.any()):
                continue
            draws = self._draws()[name]
            columns = draws.reshape(len(draws), -1)[:, imprecise].unbind(-1)
            if min(tail_shape(x) for x in columns) > NO_VARIANCE:
                self.caveats.append(
                    f"{name} has tails without a variance: use quantiles in place of its mean and sd"
                )
            else:
                found.append(
                    f"the sd of {name} is known to {errors.max().item():.0%} only, since its tails are heavy: use "
                    "quantiles, and compare with a long run of NUTS"
                )
        return found

    def _draws(self) -> dict[str, Tensor]:
        """Equally weighted draws `(N, *shape)` by site, those that the verdict is about."""
        if self.refined is not None:
            return self.refined.flat()
        return {} if self.importance is None else self.importance.resample()

    def _sd_errors(self) -> dict[str, Tensor]:
        """The relative Monte Carlo error of the sd of each latent number, by site."""
        if self.refined is not None:
            return {name: chain_sd_error(v) for name, v in self.refined.samples.items()}
        if self.importance is None:
            return {}
        weights = self.importance.smoothed_log_weights.softmax(0)
        return {name: weighted_sd_error(v, weights) for name, v in self.importance.samples.items()}

    def _unvisited(self) -> list[str]:
        """A sentence on a draw of the guide that dominates the weights and lies outside of what the chains visit."""
        if self.refined is None or self.importance is None:
            return []
        of_chains = self.posterior.chain_log_weights(self.refined)
        if of_chains is None:
            return []
        weights = self.importance.log_weights
        largest = int(weights.argmax())
        share = float(weights.softmax(0)[largest])
        if share < LARGE_SHARE or not bool(weights[largest] > of_chains.max() + MARGIN):
            return []
        where = ", ".join(
            f"{name} = {value[largest].item():.3g}"
            for name, value in list(self.importance.samples.items())[:3]
            if value[largest].numel() == 1
        )
        return [
            f"one of {len(weights)} draws of the guide carries {share:.0%} of the weight, where no chain comes"
            f"{f' ({where})' if where else ''}: a narrow mode may be missed"
        ]

    def _uncovered_modes(self) -> list[str]:
        if len(self.modes) < 2:
            return []
        points = torch.stack([mode.loc for mode in self.modes])
        log_q = self.posterior.log_prob(points)
        if log_q is None:
            return []
        found = uncovered(
            points,
            torch.tensor([mode.log_joint for mode in self.modes]),
            torch.tensor([mode.log_mass for mode in self.modes]),
            lambda _: log_q,
        )
        names = latent_names(self.posterior.start()[0].latents)
        return [
            f"{mode.describe(names)}: try AutoCIF, or fit each mode by itself" for mode in found
        ]


def chain_sd_error(draws: Tensor) -> Tensor:
    """The relative standard error of the sd of draws `(C, S, *)`, from the spread of second moments between chains."""
    x = (
        draws.detach().double().flatten(2)
        if draws.dim() > 2
        else draws.detach().double()[..., None]
    )
    moments = (x - x.mean((0, 1))).square().mean(1)
    return _half_of(moments.std(0) / len(moments) ** 0.5, moments.mean(0))


def tail_shape(draws: Tensor) -> float:
    """The Pareto shape k of the tails of draws `(N)`, larger for heavier ones: moments of order 1 / k and above are infinite.

    Vehtari et al. 2024, Pareto smoothed importance sampling, section 4: the same estimate for draws as for weights.
    """
    x = draws.detach().double()
    return pareto_smooth((x - x.median()).abs().log())[1].item()


def weighted_sd_error(draws: Tensor, weights: Tensor) -> Tensor:
    """The relative standard error of the sd of draws `(N, *)` with normalised weights `(N)`."""
    x, w = draws.detach().double().reshape(len(draws), -1), weights.to(draws.device)[:, None]
    squares = (x - (w * x).sum(0)).square()
    moment = (w * squares).sum(0)
    return _half_of((w * (squares - moment)).square().sum(0).sqrt(), moment)


def _half_of(error: Tensor, moment: Tensor) -> Tensor:
    """Half the relative error of a second moment, which is that of its root; 0 for a constant."""
    return torch.where(moment > 0, error / (2 * moment), 0.0)


def sentences(texts: Sequence[str]) -> list[str]:
    """Texts with a capital and a full stop."""
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def advice(
    reason: str,
    importance: ImportanceResult | None,
    refined: RefineResult | None,
    findings: Sequence[str],
) -> tuple[str, ...]:
    """Next steps for a result that is not trusted."""
    lines = sentences(findings)
    if refined is not None and not refined.mixed:
        lines.append(f"Chains do not mix: {'; '.join(refined.problems)}.")
    if importance is not None and not (math.isnan(importance.k_hat) or importance.reliable):
        lines.append("The weights have heavy tails: the guide is too narrow somewhere.")
    if reason == "level" and not findings:
        lines.append(
            "Try the other form of a hierarchy (effects themselves where groups have many data, standardised effects times "
            "their sd where they have few), a richer guide (AutoIAF with more layers, AutoNSF, AutoCIF), or NUTS."
        )
    elif reason == "out of steps":
        lines.append("Raise max_steps, or try a richer guide (AutoNSF, AutoCIF), or NUTS.")
    elif reason == "interrupted":
        lines.append("Call fit again to go on.")
    return tuple(lines)
