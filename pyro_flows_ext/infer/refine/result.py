"""`RefineResult`: draws by chain, and whether to trust them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ops import bulk_ess, r_hat
from .chains import ChainResult
from .drift import Drift

# R-hat (rank-normalised, split) below which chains agree. Each has a few draws only: at 1.1 half a chain is worth five
# independent ones, and what a hundred chains say together is precise long before each of them is (Margossian et al. 2024, Nested
# R-hat). Limits of 1.05 and 1.01 took 2 and 6.5 times as many gradients on three posteriors, and no verdict changed.
MAX_R_HAT = 1.1
# Effective draws of every quantity that a posterior summary needs (Vehtari et al. 2021).
MIN_ESS = 400.0


@dataclass(frozen=True)
class RefineResult:
    """Draws of many chains that started from a guide's draws.

    Attributes:
        samples: latent site -> `(C, S, *shape)`, constrained: C chains of S draws.
        drift: shifts of means and sds from the guide's draws to these.
        settling: shifts between the two halves of the run.
        chains: the same draws as vectors, with the settings of the sampler.
        num_gradients: evaluations of the gradient, of all chains each, those of adaptation and discarded draws included.
        seconds: wall-clock seconds.
        r_hat, ess: by latent site, rank-normalised split R-hat and bulk effective sample size, `(*shape)`.
    """

    samples: dict[str, Tensor] = field(repr=False)
    drift: Drift
    settling: Drift
    chains: ChainResult = field(repr=False)
    num_gradients: int
    seconds: float
    r_hat: dict[str, Tensor] = field(repr=False)
    ess: dict[str, Tensor] = field(repr=False)

    @property
    def acceptance(self) -> float:
        """The mean acceptance probability."""
        return float(self.chains.acceptance.mean())

    @property
    def max_r_hat(self) -> float:
        """The largest R-hat of any number; NaN where one is not known."""
        return max((float(v.max()) for v in self.r_hat.values()), key=_nan_last)

    @property
    def min_ess(self) -> float:
        """The smallest effective sample size of any number."""
        return min(float(v.min()) for v in self.ess.values())

    @property
    def problems(self) -> list[str]:
        """The reasons why these draws are not yet those of the posterior; empty where `mixed`."""
        found = []
        if not self.max_r_hat <= MAX_R_HAT:
            found.append(f"R-hat {self.max_r_hat:.2f} is above {MAX_R_HAT}")
        if not self.min_ess >= MIN_ESS:
            found.append(f"ESS {self.min_ess:.0f} is below {MIN_ESS:.0f}")
        if self.chains.is_divergent:
            found.append(
                f"{self.chains.divergent:.1%} of trajectories diverge, so that chains hardly enter some narrow region"
            )
        if self.chains.num_stuck:
            found.append(
                f"{self.chains.num_stuck} of {len(self.chains.u)} chains do not move, or not to where the others are"
            )
        if self.chains.is_transient:
            found.append("some chains are still on their way from a start far out")
        if self.settling.detected:
            found.append(
                f"the run has not settled: between its halves, {self.settling.describe(self.settling.worst)}"
            )
        return found

    @property
    def is_without_drift(self) -> bool:
        """Whether chains could have drifted from the guide's draws, and did not."""
        return self.drift.conclusive and not self.drift.detected and not self.chains.is_divergent

    @property
    def mixed(self) -> bool:
        """Whether chains agree, move, do not diverge, have settled, and give enough effective draws."""
        return not self.problems

    @property
    def shape(self) -> tuple[int, int]:
        """(C, S): the numbers of chains and draws of each."""
        return self.chains.u.shape[0], self.chains.u.shape[1]

    def flat(self, num: int | None = None) -> dict[str, Tensor]:
        """Draws without their chains: site -> `(num, *shape)`; all by default, else a random choice of them.

        Without replacement where there are enough. Raises `ValueError` for a number below one.
        """
        total = self.shape[0] * self.shape[1]
        flat = {name: value.flatten(0, 1) for name, value in self.samples.items()}
        if num is None:
            return flat
        if num < 1:
            raise ValueError(f"num: expected a positive integer, got {num!r}")
        rows = torch.randperm(total) if num <= total else torch.randint(total, (num,))
        return {name: value[rows[:num].to(value.device)] for name, value in flat.items()}

    def to_arrays(self) -> dict[str, Any]:
        """Draws as NumPy arrays `(chain, draw, *shape)` by site, as `arviz.from_dict` takes them."""
        return {name: value.detach().cpu().numpy() for name, value in self.samples.items()}

    def __str__(self) -> str:
        C, S = self.shape
        run = (
            f"{C} chains of {S} draws   R-hat {self.max_r_hat:.2f}   ESS {self.min_ess:.0f}   acceptance "
            f"{self.acceptance:.2f}   {self.num_gradients} gradients in {self.seconds:.1f} s"
        )
        guide = f"From the guide: {self.drift}."
        if self.mixed:
            return f"{run}\n{guide}\nMixed: the draws are those of the posterior around the guide; separate modes are not found."
        return f"{run}\n{guide}\nNot mixed: {'; '.join(self.problems)}. Train the guide further, or raise max_gradients."


def statistics(samples: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """R-hat and bulk ESS of draws by chain; NaN where there are too few draws."""
    if min(next(iter(samples.values())).shape[:2]) < 4:
        unknown = {name: torch.full(v.shape[2:], torch.nan) for name, v in samples.items()}
        return unknown, unknown
    rows = {name: v.detach() for name, v in samples.items()}
    return {n: r_hat(v) for n, v in rows.items()}, {n: bulk_ess(v) for n, v in rows.items()}


def _nan_last(x: float) -> float:
    return x if x == x else float("inf")
