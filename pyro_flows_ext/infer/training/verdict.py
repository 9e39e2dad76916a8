"""The verdict on a guide: its weights, chains that start from its draws, and modes that it does not cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..importance import ImportanceResult
from ..refine import RefineResult, refine_density, uncovered, verify
from ..refine.refine import latent_names
from ..warm_start import Mode
from .posterior import Posterior

# k-hat up to which weighted draws can be relied on (Vehtari et al. 2024).
MAX_K_HAT = 0.7
# Gradients, of all chains at once, for a check of drift and for the first attempt to refine; the budget doubles.
VERIFY_GRADIENTS, REFINE_GRADIENTS, MAX_GRADIENTS = 160, 600, 2400
# Effective draws at which chains stop: means to .03 sd.
CHAIN_ESS = 1000.0
# Below these effective shares the guide's draws are too few places for chains to start from, before any training and after
# some: a hundred steps cost less than chains that do not mix.
LEAST_EFFICIENCY_AT_START, LEAST_EFFICIENCY = 0.1, 0.02
# Below this effective share chains run twice as long.
FAIR_EFFICIENCY = 0.2


@dataclass
class Judge:
    """Decides after each round whether the guide's draws, or chains that start from them, are the posterior's.

    Attributes:
        posterior: the guide's draws.
        target_ess: the effective share of draws at which weights are trusted.
        refine: whether chains may replace the guide's draws.
        num_draws: draws weighed at a time.
        modes: modes of the posterior known from the warm start.
    """

    posterior: Posterior
    target_ess: float
    refine: bool
    num_draws: int
    modes: Sequence[Mode] = ()
    importance: ImportanceResult | None = None
    refined: RefineResult | None = None
    missed: list[str] = field(default_factory=list)
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
                return self._covers()
            if not self.refine:
                return False
            self.refined = refine_density(
                target, start, max_gradients=MAX_GRADIENTS, target_ess=CHAIN_ESS, previous=checked
            )
            return self.refined.mixed and self._covers()
        least = LEAST_EFFICIENCY_AT_START if first else LEAST_EFFICIENCY
        if not self.refine or not (last or result.efficiency >= least):
            return False
        target, start = self.posterior.start()
        budget = MAX_GRADIENTS if last else self.budget
        self.budget = min(2 * self.budget, MAX_GRADIENTS)
        self.refined = refine_density(target, start, max_gradients=budget, target_ess=CHAIN_ESS)
        return self.refined.mixed and self._covers()

    def _covers(self) -> bool:
        """Whether the guide's density is that of the modes that are known; fills in `missed`."""
        self.missed = []
        if len(self.modes) < 2:
            return True
        points = torch.stack([mode.loc for mode in self.modes])
        log_q = self.posterior.log_prob(points)
        if log_q is None:
            return True
        found = uncovered(
            points,
            torch.tensor([mode.log_joint for mode in self.modes]),
            torch.tensor([mode.log_mass for mode in self.modes]),
            lambda _: log_q,
        )
        names = latent_names(self.posterior.start()[0].latents)
        self.missed = [mode.describe(names) for mode in found]
        return not self.missed


def advice(
    reason: str,
    importance: ImportanceResult | None,
    refined: RefineResult | None,
    missed: Sequence[str],
) -> tuple[str, ...]:
    """What to try next, for a result that is not trusted."""
    lines = [
        f"{text[0].upper()}{text[1:]}: try AutoCIF, or fit each mode by itself." for text in missed
    ]
    if refined is not None and not refined.mixed:
        lines.append(f"Chains do not mix: {'; '.join(refined.problems)}.")
    if importance is not None and not (math.isnan(importance.k_hat) or importance.reliable):
        lines.append("The weights have heavy tails: the guide is too narrow somewhere.")
    if reason == "level":
        lines.append(
            "Try a richer guide (AutoIAF with more layers, AutoNSF, AutoCIF), a non-centred form of the model, or NUTS."
        )
    elif reason == "out of steps":
        lines.append("Raise max_steps, or try a richer guide (AutoNSF, AutoCIF), or NUTS.")
    elif reason == "interrupted":
        lines.append("Call fit again to go on.")
    return tuple(lines)
