"""Annealed importance sampling: the evidence, by chains from a normalised density to the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from ..ops import check_positive, effective_sample_size
from ..programs import Program, is_delta, vectorization_error
from .local_density import LocalDensity

# u -> log-densities of start and target there, both unnormalised or not.
Ends = Callable[[Tensor], tuple[Tensor, Tensor]]

# The optimal acceptance in high dimension (Beskos et al. 2013: .651).
TARGET_ACCEPTANCE = 0.65
# Pilot chains, which set the step sizes and do not count; draws that estimate the scale of the start.
PILOTS, SCALE_DRAWS = 4, 64
# Moves before annealing, and how fast log ε follows the acceptance: by .2 a step at most, with a noise of .05.
WARM_UP, RATE = 30, 0.3
# A trajectory's step is ε times a number from this range, against periodic trajectories.
JITTER = (0.8, 1.2)
# Half the range of the sigmoid of inverse temperatures.
SIGMOID_RANGE = 4.0


class Start(Protocol):
    """A distribution over `(*data, D)`: of torch, of Pyro, or any with these two methods."""

    def sample(self, sample_shape: torch.Size) -> Tensor: ...

    def log_prob(self, value: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class AISResult:
    """Chains of annealed importance sampling, for every datum of a batch `data`, `()` for a single density.

    Attributes:
        log_evidence: `(*data)`, log of the mean weight, in nats. Lower bound in expectation: the mean weight is
            unbiased, and its logarithm falls short by about se² / 2.
        log_evidence_se: `(*data)`, its standard error, to first order; unreliable if `ess` is small.
        ess: effective sample size of the chains' weights, `(*data)`.
        acceptance: mean over chains and steps, `(*data)`.
        step_size: the last one, in units of the start's standard deviations, `(*data)`.
        log_weights: `(C, *data)`, float64.
        samples: `(C, *data, D)`, the ends of the chains; closer to the target with more steps.
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    ess: Tensor
    acceptance: Tensor
    step_size: Tensor
    log_weights: Tensor = field(repr=False)
    samples: Tensor = field(repr=False)

    def __str__(self) -> str:
        num = len(self.log_weights)
        if self.log_evidence.dim() == 0:
            what = f"log evidence {self.log_evidence:.3f} ± {self.log_evidence_se:.2g}"
        else:
            what = (
                f"log evidence of {self.log_evidence.numel()} data: {self.log_evidence.mean():.3f} on average, with a "
                f"median standard error of {self.log_evidence_se.median():.2g}"
            )
        return f"{what}   ESS {self.ess.mean():.1f} of {num} chains   acceptance {self.acceptance.mean():.2f}"


def annealed_importance_sampling(
    log_density: Callable[[Tensor], Tensor],
    start: Start,
    *,
    num_chains: int = 16,
    num_steps: int = 500,
    num_leapfrog: int = 10,
) -> AISResult:
    """Lower bound in expectation: log ∫ f(u) du, in nats, by chains from `start` q to f through q^(1 - β) f^β.

    Each inverse temperature β (of a sigmoid, dense at both ends) takes a Hamiltonian Monte Carlo move. Step sizes
    follow the acceptance, towards .65, of four pilot chains that do not count: chains that adapt to their own past
    would not leave the tempered density invariant, and the weights would be biased.
    Cost: `num_steps` (`num_leapfrog` + 1) gradients for `num_chains` + 4 chains.

    Args:
        log_density: u `(C, *data, D)` -> log f(u) `(C, *data)`, differentiable, such as `programs.LogJoint`. A batch
            `data` is as many integrals at once, each with its own step sizes. f is zero where its logarithm is NaN.
        start: q, with draws of shape `(*data, D)`.
        num_chains: C.
        num_steps: number of inverse temperatures.
        num_leapfrog: steps of a move, in units of the start's standard deviations.

    Raises:
        ValueError: if shapes do not fit.

    References:
        Neal 2001, Annealed importance sampling; schedule and target acceptance: Wu, Burda, Salakhutdinov & Grosse 2017,
        On the quantitative analysis of decoder-based generative models.
    """

    def ends(u: Tensor) -> tuple[Tensor, Tensor]:
        return start.log_prob(u), log_density(u)

    return anneal(
        ends,
        lambda num: start.sample(torch.Size([num])),
        num_chains=num_chains,
        num_steps=num_steps,
        num_leapfrog=num_leapfrog,
    )


def log_evidence_ais(
    model: Program,
    *args: Any,
    guide: Program | None = None,
    plate: str | None = None,
    num_chains: int = 16,
    num_steps: int = 500,
    num_leapfrog: int = 10,
    **kwargs: Any,
) -> AISResult:
    """log p(x) of a Pyro model by annealing the likelihood, from the prior to the posterior by default.

    See `annealed_importance_sampling`. `samples` of the result are unconstrained, with latents in the order of the
    model.

    Args:
        model: a Pyro model that can run many particles at once.
        args, kwargs: its arguments.
        guide: a start in place of the prior: an AutoContinuous guide, flow guides among them, or a guide written by
            hand without auxiliary sites. A start closer to the posterior needs fewer steps; the mass of a mode that it
            misses is missed.
        plate: the data plate that all latents are local to, for an estimate by datum, `(N)`.
        num_chains, num_steps, num_leapfrog: as in `annealed_importance_sampling`.

    Raises:
        ValueError: for a discrete latent, a subsampled plate other than `plate`, and a model that does not vectorise.
        TypeError: for a guide whose density cannot be evaluated at given values.
    """
    plates = () if plate is None else (plate,)
    density = LocalDensity(model, args, kwargs, plates=plates)
    for name, indices in density.subsamples.items():
        if len(indices) < density.full_sizes[name] and name != plate:
            raise ValueError(
                f"plate {name!r} subsamples {len(indices)} of {density.full_sizes[name]}: expected the full data here; "
                "call the model without subsample_size"
            )
    ends: Ends = density.prior_and_joint
    draw: Callable[[int], Tensor] = density.draw_prior
    proposal = poutine.block(model, expose=list(density.sites))
    if guide is not None:
        proposal = guide
        ends, draw = _from_guide(density, guide)
    reason = vectorization_error(density.model, proposal, args, kwargs)
    if reason is not None:
        raise ValueError(f"model: expected one that runs many chains at once: {reason}")
    return anneal(ends, draw, num_chains=num_chains, num_steps=num_steps, num_leapfrog=num_leapfrog)


def _from_guide(density: LocalDensity, guide: Program) -> tuple[Ends, Callable[[int], Tensor]]:
    """log q and log p(x, u) in unconstrained space, and draws of q."""
    if isinstance(guide, AutoContinuous):
        if density.plates:
            raise TypeError(
                f"guide: a {type(guide).__name__} has one density for all data; with plate= expected one written by hand"
            )
        with torch.no_grad(), poutine.block():
            guide(*density.args, **density.kwargs)
        posterior = guide.get_posterior(*density.args, **density.kwargs)
        return (
            lambda u: (posterior.log_prob(u), density(u)),
            lambda num: posterior.sample(torch.Size([num])),
        )
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(guide).get_trace(*density.args, **density.kwargs)
    names = {n for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    names -= density.subsamples.keys()
    if names != density.sites.keys() or any(is_delta(trace.nodes[n]["fn"]) for n in names):
        raise TypeError(
            f"guide: expected an AutoContinuous guide, or one with a density at the sites {sorted(density.sites)} and no "
            f"other latents, got the sites {sorted(names)}"
        )
    return (
        lambda u: (density.log_guide(guide, u), density(u)),
        lambda num: density.draw_guide(guide, num)[0],
    )


@torch.no_grad()
def anneal(
    ends: Ends,
    draw: Callable[[int], Tensor],
    *,
    num_chains: int = 16,
    num_steps: int = 500,
    num_leapfrog: int = 10,
) -> AISResult:
    """`annealed_importance_sampling` with both densities from one call, and `draw`: n -> draws of the start `(n, *data,
    D)`."""
    check_positive("num_chains", num_chains)
    check_positive("num_leapfrog", num_leapfrog)
    betas = _schedule(check_positive("num_steps", num_steps))
    scale = draw(SCALE_DRAWS).std(0)
    chains = _Chains(ends, draw(PILOTS + num_chains), scale, num_leapfrog)
    for _ in range(WARM_UP):
        chains.adapt(chains.move(0.0))
    log_w = torch.zeros_like(chains.target, dtype=torch.float64)
    acceptance = torch.zeros_like(chains.target)
    for before, beta in pairwise(betas):
        increment = (beta - before) * (chains.target.double() - chains.start.double())
        log_w = log_w + torch.where(increment.isnan(), -torch.inf, increment)
        accepted = chains.move(beta)
        acceptance += accepted / num_steps
        chains.adapt(accepted)
    log_w = log_w[PILOTS:]
    log_evidence, log_evidence_se = log_mean_weight(log_w)
    return AISResult(
        log_evidence=log_evidence,
        log_evidence_se=log_evidence_se,
        ess=effective_sample_size(log_w.movedim(0, -1)),
        acceptance=acceptance[PILOTS:].mean(0),
        step_size=chains.log_step.exp(),
        log_weights=log_w,
        samples=chains.u[PILOTS:],
    )


def log_mean_weight(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean of weights `(K, *)`, and its standard error to first order (delta method), NaN for K = 1."""
    K = len(log_w)
    log_mean = log_w.logsumexp(0) - math.log(K)
    if K == 1:
        return log_mean, torch.full_like(log_mean, math.nan)
    weights = (log_w - log_w.amax(0)).exp()
    return log_mean, weights.std(0) / weights.mean(0) / K**0.5


def _schedule(num_steps: int) -> list[float]:
    """0 = β_0 < ... < β_T = 1: a sigmoid's values at T + 1 equally spaced places, stretched to reach both ends."""
    places = torch.linspace(-SIGMOID_RANGE, SIGMOID_RANGE, num_steps + 1, dtype=torch.float64)
    values = places.sigmoid()
    return ((values - values[0]) / (values[-1] - values[0])).tolist()


class _Chains:
    """Positions u `(C, *data, D)`, with the log-densities of start and target there, moved by Hamiltonian Monte
    Carlo."""

    def __init__(self, ends: Ends, u: Tensor, scale: Tensor, num_leapfrog: int):
        self.ends, self.u, self.scale, self.num_leapfrog = ends, u, scale, num_leapfrog
        self.start, self.target = ends(u)
        for name, value in (("start", self.start), ("log_density", self.target)):
            if value.shape != u.shape[:-1]:
                raise ValueError(
                    f"{name}: expected one number a row, for u of shape {tuple(u.shape)} a tensor of shape "
                    f"{tuple(u.shape[:-1])}, got {tuple(value.shape)}"
                )
        self.log_step = u.new_full(u.shape[1:-1], -math.log(u.shape[-1]) / 4)

    def move(self, beta: float) -> Tensor:
        """A move that leaves the density at β invariant; the probabilities `(C, *data)` with which it was accepted."""
        u, start, target = self.u, self.start, self.target
        low, high = JITTER
        step = self.log_step.exp() * (low + (high - low) * torch.rand_like(start))
        step = step.unsqueeze(-1) * self.scale
        momentum = torch.randn_like(u)
        energy = momentum.square().sum(-1) / 2 - _mixed(start, target, beta)
        momentum = momentum + step / 2 * self._gradient(u, beta)[2]
        for i in range(self.num_leapfrog):
            # If it is not finite, neither is the momentum, and the move is rejected; densities may raise there.
            u = (u + step * momentum).nan_to_num(0.0, 0.0, 0.0)
            start, target, gradient = self._gradient(u, beta)
            momentum = momentum + (step if i < self.num_leapfrog - 1 else step / 2) * gradient
        change = energy - momentum.square().sum(-1) / 2 + _mixed(start, target, beta)
        accepted = torch.where(change.isnan(), -torch.inf, change).clamp(max=0).exp()
        moved = torch.rand_like(accepted) < accepted
        self.u = torch.where(moved.unsqueeze(-1), u, self.u)
        self.start = torch.where(moved, start, self.start)
        self.target = torch.where(moved, target, self.target)
        return accepted

    def adapt(self, accepted: Tensor) -> None:
        """Moves log ε by what the pilots accepted."""
        self.log_step = self.log_step + RATE * (accepted[:PILOTS].mean(0) - TARGET_ACCEPTANCE)

    def _gradient(self, u: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Both log-densities, and the gradient at β: 0 where it is not finite."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            start, target = self.ends(u)
            (gradient,) = torch.autograd.grad(_mixed(start, target, beta).sum(), u)
        finite = gradient.isfinite().all(-1, keepdim=True)
        return start.detach(), target.detach(), torch.where(finite, gradient, 0.0)


def _mixed(start: Tensor, target: Tensor, beta: float) -> Tensor:
    """(1 - β) log q + β log f, and at the ends one of them, whatever the other is."""
    if beta in (0.0, 1.0):
        return target if beta else start
    return (1 - beta) * start + beta * target
