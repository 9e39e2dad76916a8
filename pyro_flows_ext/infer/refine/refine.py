"""`refine`: the draws of a guide moved to the posterior by many short chains, and the verdict on the guide."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...programs import Latent, LogJoint, Program, evaluation_mode
from .._loop import seeded
from .adaptation import Tuning, tuned_step_size, without_divergences
from .chains import MAX_LEAPFROG, ChainResult, run_chains
from .coordinates import Start, start_at
from .drift import MIN_CHAINS, Drift, drift_from, drift_within
from .energy import PulledBack
from .result import MAX_R_HAT, MIN_ESS, RefineResult, statistics

# Chains where a gradient of all of them takes less than the first number of seconds, and so on.
CHAINS_BY_SECONDS = ((0.06, 128), (0.15, 64), (math.inf, 32))
# Draws of each chain at the first look; the number doubles from look to look.
FIRST_LOOK, MAX_LOOKS = 16, 6
# Draws beyond those that the last look says are needed: its estimates are rough.
MARGIN = 1.15
# Draws of each chain that are left where the first half is discarded.
MIN_LEFT = 4
# Times the budget that chains would need, by R-hat, where they give up.
HOPELESS = 1.5
# Draws of the guide that the chains' starts stand for: their mean is known to .011 sd.
POPULATION = 8192
# Effective draws at which chains stop: means to .03 sd over the worst of 20 latents.
TARGET_ESS = 1500.0
TARGET_ACCEPTANCE = 0.8


def refine(
    model: Program,
    guide: Program,
    *args: Any,
    num_chains: int | None = None,
    max_gradients: int = 500,
    max_seconds: float | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> RefineResult:
    """Moves draws of a trained guide to the posterior: many short chains of HMC in the guide's coordinates.

    Chains start from the guide's draws and run in the noise from which the guide makes them, where the posterior is
    nearly standard normal. They stop when they agree (R-hat), have settled and give 1500 effective draws of every latent, or at
    the budget. Parameters of model and guide are held fixed.

    Args:
        model, guide: the guide trained on the model; any `AutoContinuous`, or any other guide, in whose
            mean and covariance the chains then run.
        args, kwargs: the model's arguments.
        num_chains: 128 by default, 64 or 32 where a gradient of that many takes more than .06 or .15 s.
        max_gradients: budget of gradients, each of all chains at once.
        max_seconds: budget of wall-clock seconds; the result then depends on the machine.
        seed: makes the run reproducible, and leaves the global generators as they were.

    Returns:
        RefineResult: draws by chain, R-hat, ESS, and the drift from the guide's draws.

    Raises:
        ValueError: for a guide that is not set up or whose draws are points, under a subsampled plate, and where no draw of
            the guide has a density.

    References:
        Hoffman et al. 2019, NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport; Hoffman,
        Radul & Sountsov 2021, An adaptive-MCMC scheme for setting trajectory lengths in HMC; Margossian et al. 2024,
        Nested R-hat: assessing the convergence of MCMC when running many short chains.
    """
    with seeded(seed), evaluation_mode(model), evaluation_mode(guide):
        target, start = start_at(model, guide, args, kwargs)
        return refine_density(
            target,
            start,
            num_chains=num_chains,
            max_gradients=max_gradients,
            max_seconds=max_seconds,
        )


def verify(
    target: LogJoint,
    start: Start,
    *,
    num_chains: int | None = None,
    max_gradients: int = 150,
    max_seconds: float | None = None,
) -> RefineResult:
    """Chains that run until it is clear whether they drift from the guide: `result.drift`.

    See `refine_density`. Without drift they stop where a shift of .15 sd of a mean, or of 15 % of an sd, would have been found.
    """
    run = _Run(target, start, num_chains, max_gradients, max_seconds)
    return run.until(
        lambda: (
            run.drift.detected
            or (run.drift.conclusive and run.is_settled and not run.chains.is_divergent)
        )
    )


def refine_density(
    target: LogJoint,
    start: Start,
    *,
    num_chains: int | None = None,
    max_gradients: int = 500,
    max_seconds: float | None = None,
    target_ess: float = TARGET_ESS,
    previous: RefineResult | None = None,
    gives_up: bool = False,
) -> RefineResult:
    """Chains that run until they mix: see `refine`.

    Args:
        target: a model's log joint, or another density with `latents` and `constrain`.
        start: coordinates and starts: see `start_at`.
        num_chains, max_gradients, max_seconds: see `refine`.
        target_ess: effective draws of every latent at which to stop; in proportion fewer, but 400, with fewer chains than 128 by
            default.
        previous: the result of `verify` at the same start, whose chains then go on.
        gives_up: whether to end, unmixed, where R-hat says that several times the budget would be needed.
    """
    run = _Run(target, start, num_chains, max_gradients, max_seconds, previous)
    # Where gradients are dear there are fewer chains, and fewer draws have to do.
    share = 1.0 if num_chains is not None else len(run.chains.u) / CHAINS_BY_SECONDS[0][1]
    wanted = run.target_ess = max(MIN_ESS, share * target_ess)
    return run.until(
        lambda: (run.is_mixed and run.min_ess >= wanted) or (gives_up and run.is_hopeless)
    )


class _Run:
    """Chains that advance until a test of them passes or the budget is spent."""

    def __init__(
        self,
        target: LogJoint,
        start: Start,
        num_chains: int | None,
        max_gradients: int,
        max_seconds: float | None,
        previous: RefineResult | None = None,
    ):
        if num_chains is not None and num_chains < MIN_CHAINS:
            raise ValueError(
                f"num_chains: expected {MIN_CHAINS} or more, for statistics between chains, got {num_chains!r}"
            )
        self.began = time.perf_counter()
        self.target, self.start = target, start
        self.max_gradients, self.max_seconds = max_gradients, max_seconds
        self.target_ess: float | None = None
        self.names = latent_names(target.latents)
        self.population = start.draw_latents(POPULATION)
        if previous is not None:
            self.chains, self.num_gradients = previous.chains, previous.num_gradients
            self.began -= previous.seconds
        else:
            self.num_gradients = 0
            z0 = start.draw(num_chains or self._affordable_chains())
            self.chains = self._advance(z0, FIRST_LOOK, None)

    def until(self, done: Callable[[], bool]) -> RefineResult:
        for _ in range(MAX_LOOKS):
            self._look()
            if done() or self._is_spent():
                break
            # Chains that have moved were tuned too far from where they are now.
            moved = self.max_r_hat > MAX_R_HAT and (self.drift.detected or self.settling.detected)
            tuning = None if moved and not self.chains.is_divergent else self._tuning()
            num = self._num_missing()
            if self.settling.detected or self.chains.has_far_chains:
                self.chains = self.chains.after(self.chains.u.shape[1] // 2)
            more = self._advance(self.chains.z[:, -1], num, tuning)
            self.chains = self.chains.followed_by(more)
        else:
            self._look()
        samples = _constrained(self.target, self.chains.u)
        r_hats, ess = statistics(samples)
        return RefineResult(
            samples=samples,
            drift=self.drift,
            settling=self.settling,
            chains=self.chains,
            num_gradients=self.num_gradients,
            seconds=time.perf_counter() - self.began,
            r_hat=r_hats,
            ess=ess,
        )

    def _num_missing(self) -> int:
        """Draws until the next look: as many as there are, or fewer where R-hat and ESS say that they will do.

        R-hat² - 1 falls as 1 / S, the effective size rises as S.
        """
        S = self.chains.u.shape[1]
        known = math.isfinite(self.max_r_hat) and self.min_ess > 0 and S >= 2 * FIRST_LOOK
        if (
            known
            and self.target_ess is not None
            and self.is_settled
            and not self.chains.is_divergent
            and not self.chains.num_stuck
        ):
            by_r_hat = (self.max_r_hat**2 - 1) / (MAX_R_HAT**2 - 1)
            factor = MARGIN * max(by_r_hat, self.target_ess / self.min_ess)
            return min(S, max(math.ceil((factor - 1) * S), FIRST_LOOK // 2))
        return max(S, FIRST_LOOK)

    def _look(self) -> None:
        while self.chains.is_transient and self.chains.u.shape[1] >= 2 * MIN_LEFT:
            self.chains = self.chains.after(self.chains.u.shape[1] // 2)
        u = self.chains.u
        self.drift: Drift = drift_from(
            self.chains.start, u, self.population, names=self.names, num_looks=MAX_LOOKS
        )
        self.settling: Drift = drift_within(u, names=self.names, num_looks=MAX_LOOKS)
        r_hats, ess = statistics({"u": u})
        self.max_r_hat, self.min_ess = float(r_hats["u"].max()), float(ess["u"].min())

    @property
    def is_settled(self) -> bool:
        return not self.settling.detected

    @property
    def is_mixed(self) -> bool:
        agree = self.max_r_hat <= MAX_R_HAT and self.min_ess >= MIN_ESS
        is_sound = not self.chains.num_stuck and not self.chains.is_divergent
        return agree and self.is_settled and is_sound

    @property
    def is_hopeless(self) -> bool:
        """Whether, from what a draw has cost so far and R-hat² - 1 ~ 1 / S, the budget is too small by far."""
        S = self.chains.u.shape[1]
        if S < FIRST_LOOK or self.max_r_hat <= MAX_R_HAT:
            return False
        factor = (self.max_r_hat**2 - 1) / (MAX_R_HAT**2 - 1)
        return factor * S * self.chains.tuning.num_leapfrog > HOPELESS * self.max_gradients

    def _is_spent(self) -> bool:
        left = self.max_gradients - self.num_gradients
        return left < self.chains.tuning.num_leapfrog + 1 or self._seconds_left() <= 0

    def _seconds_left(self) -> float:
        if self.max_seconds is None:
            return math.inf
        return self.max_seconds - (time.perf_counter() - self.began)

    def _advance(self, z: Tensor, num: int, tuning: Tuning | None) -> ChainResult:
        seconds = self._seconds_left()
        chains = run_chains(
            self.target,
            self.start.transform,
            z,
            num_transitions=num,
            tuning=tuning,
            target_acceptance=TARGET_ACCEPTANCE,
            max_gradients=self.max_gradients - self.num_gradients,
            max_seconds=None if math.isinf(seconds) else max(seconds, 1e-3),
        )
        self.num_gradients += chains.num_gradients
        return chains

    def _tuning(self) -> Tuning:
        """The settings so far, the step size corrected by the acceptance rate."""
        chains = self.chains
        step_size = tuned_step_size(chains.tuning.step_size, chains.rate, TARGET_ACCEPTANCE)
        longest = max(chains.tuning.num_leapfrog, MAX_LEAPFROG)
        return without_divergences(chains.tuning, step_size, chains.divergent, longest)

    def _affordable_chains(self) -> int:
        """The number of chains by the measured seconds of a gradient."""
        density = PulledBack(self.target, self.start.transform)
        most, seconds = CHAINS_BY_SECONDS[0][1], 0.0
        # At a quarter of the chains first: where this is cheap, so are all of them.
        for num in (most // 4, most // 4, most):
            z = self.start.draw(num)
            began = time.perf_counter()
            density(z)
            seconds = (time.perf_counter() - began) * (4 if num < most else 1)
            if num < most and density.num_gradients == 2 and seconds < CHAINS_BY_SECONDS[0][0]:
                break
        self.num_gradients += density.num_gradients
        return next(num for limit, num in CHAINS_BY_SECONDS if seconds <= limit)


def latent_names(latents: Sequence[Latent]) -> tuple[str, ...]:
    """A name for each unconstrained number, `site[index]`, indices from zero."""
    names: list[str] = []
    for latent in latents:
        shape = latent.unconstrained_shape
        indices = [",".join(map(str, i)) for i in np.ndindex(*shape)]
        names += [f"{latent.name}[{i}]" if i else latent.name for i in indices]
    return tuple(names)


def _constrained(target: LogJoint, u: Tensor) -> dict[str, Tensor]:
    """The latents of u `(C, S, D)` by site, `(C, S, *shape)`."""
    values = target.constrain(u.flatten(0, 1))
    return {name: v.reshape(*u.shape[:2], *v.shape[1:]) for name, v in values.items()}
