"""The verdict on a guide: its weights, chains that start from its draws, and modes that it does not cover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...ops import pareto_smooth
from ..importance import ImportanceResult
from ..refine import RefineResult, refine_density, uncovered, verify
from ..refine.refine import latent_names
from ..warm_start import Mode
from .posterior import Posterior

# k-hat up to which weighted draws can be relied on (Vehtari et al. 2024).
MAX_K_HAT = 0.7
# k-hat, twice, from which chains are not trusted either: in coordinates with lighter tails than the posterior's they mix, and
# still miss the tails.
MAX_CHAIN_K_HAT = 0.8
# Gradients, of all chains at once, for a check of drift and for the first attempt to refine; the budget doubles.
VERIFY_GRADIENTS, REFINE_GRADIENTS, MAX_GRADIENTS = 160, 600, 2400
# Effective draws at which chains stop: means to .03 sd.
CHAIN_ESS = 1000.0
# Below these effective shares the guide's draws are too few places for chains to start from, before any training and after
# some: a hundred steps cost less than chains that do not mix.
LEAST_EFFICIENCY_AT_START, LEAST_EFFICIENCY = 0.1, 0.02
# Shapes of a latent's tail from which its sd is not trusted: without a variance, and where the weights have heavy tails too.
# Of reference posteriors without heavy tails none has more than .25 in 2000 draws, .16 in 8000. At most `MAX_TAILS` numbers
# of a site are tested.
MAX_TAIL_SHAPE, SUSPECT_TAIL_SHAPE, MAX_TAILS = 0.5, 0.2, 300
# Below this effective share chains run twice as long.
FAIR_EFFICIENCY = 0.2


@dataclass
class TrustCheck:
    """Decides after each round whether the guide's draws, or chains that start from them, are the posterior's.

    Attributes:
        posterior: the guide's draws.
        target_ess: the effective share of draws at which weights are trusted.
        refine: whether chains may replace the guide's draws.
        num_draws: draws weighed at a time.
        modes: modes of the posterior known from the warm start.
        findings: reasons not to trust draws that weights and chains agree on: modes that are not covered, tails that are
            too heavy for a mean. More steps do not help against them.
    """

    posterior: Posterior
    target_ess: float
    refine: bool
    num_draws: int
    modes: Sequence[Mode] = ()
    importance: ImportanceResult | None = None
    refined: RefineResult | None = None
    findings: list[str] = field(default_factory=list)
    budget: int = REFINE_GRADIENTS

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
            target, start = self.posterior.start()
            checked = verify(target, start, max_gradients=VERIFY_GRADIENTS)
            if not checked.drift.detected:
                self.refined = None
                return self._has_no_findings(result, first)
            if not self.refine:
                return False
            self.refined = refine_density(
                target, start, max_gradients=MAX_GRADIENTS, target_ess=CHAIN_ESS, previous=checked
            )
            return self.refined.mixed and self._has_no_findings(result, first)
        least = LEAST_EFFICIENCY_AT_START if first else LEAST_EFFICIENCY
        if not self.refine or not (last or result.efficiency >= least):
            return False
        is_heavy = not result.k_hat < MAX_CHAIN_K_HAT and not self.weigh().k_hat < MAX_CHAIN_K_HAT
        if is_heavy and not last:
            return False
        target, start = self.posterior.start()
        budget = MAX_GRADIENTS if last else self.budget
        self.budget = min(2 * self.budget, MAX_GRADIENTS)
        # Chains from few places need longer to forget them.
        ess = CHAIN_ESS if result.efficiency >= FAIR_EFFICIENCY else 2 * CHAIN_ESS
        self.refined = refine_density(target, start, max_gradients=budget, target_ess=ess)
        return self.refined.mixed and not is_heavy and self._has_no_findings(result, first)

    def draws(self) -> dict[str, Tensor]:
        """The draws that the verdict is about: site -> `(N, *shape)`."""
        if self.refined is not None:
            return self.refined.flat()
        return self.importance.resample() if self.importance is not None else {}

    def _has_no_findings(self, result: ImportanceResult, first: bool) -> bool:
        # Heavy tails of the weights come from latents with heavy tails, which the guide's draws show only in part.
        is_heavy = not result.k_hat < MAX_K_HAT
        tails = heavy_tails(self.draws(), SUSPECT_TAIL_SHAPE if is_heavy else MAX_TAIL_SHAPE)
        if tails and first:  # a round of training may lighten them
            return False
        self.findings = [*self._uncovered_modes(), *tails]
        return not self.findings

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


def heavy_tails(draws: Mapping[str, Tensor], max_shape: float) -> list[str]:
    """Sentences on latents whose tails are those of a generalised Pareto with a shape of `max_shape` or more.

    From 1/2 on there is no variance, and the sd of draws is whatever the largest one makes it.
    """
    found = []
    for name, value in draws.items():
        flat = value.detach().double().reshape(len(value), -1)
        distances = (flat - flat.median(0).values).abs().log()
        shapes = [pareto_smooth(column)[1].item() for column in distances.T[:MAX_TAILS]]
        worst = max(shapes, default=-math.inf)
        if max_shape <= worst < math.inf:
            found.append(
                f"{name} has tails too heavy for a mean and sd (Pareto shape {worst:.2f}): use quantiles, and compare "
                "with a long run of NUTS"
            )
    return found


def advice(
    reason: str,
    importance: ImportanceResult | None,
    refined: RefineResult | None,
    findings: Sequence[str],
) -> tuple[str, ...]:
    """What to try next, for a result that is not trusted."""
    lines = [f"{text[0].upper()}{text[1:]}." for text in findings]
    if refined is not None and not refined.mixed:
        lines.append(f"Chains do not mix: {'; '.join(refined.problems)}.")
    if importance is not None and not (math.isnan(importance.k_hat) or importance.reliable):
        lines.append("The weights have heavy tails: the guide is too narrow somewhere.")
    if reason == "level" and not findings:
        lines.append(
            "Try a richer guide (AutoIAF with more layers, AutoNSF, AutoCIF), a non-centred form of the model, or NUTS."
        )
    elif reason == "out of steps":
        lines.append("Raise max_steps, or try a richer guide (AutoNSF, AutoCIF), or NUTS.")
    elif reason == "interrupted":
        lines.append("Call fit again to go on.")
    return tuple(lines)
