"""Natural-gradient ascent of the ELBO of a Gaussian with a dense covariance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .batch_and_match import LEAST_FINITE, truncated_elbo
from .climb import ValueAndGradient
from .gaussian import DenseGaussian, Gaussian, tril_of_root

# The rate falls along half a cosine: large steps first, then steps that average the noise out.
FIRST_RATE, LAST_RATE = 0.7, 0.02
# A draw counts at most this often as much as the median one: scores of heavy tails have no variance.
CLIP = 3.0
# Precisions change by at most this factor and its inverse in a step, and means by this many standard deviations a latent.
MAX_CHANGE, MAX_SHIFT = 3.0, 1.0


@torch.no_grad()
def natural_gradient(
    target: ValueAndGradient, start: Gaussian, *, num_steps: int, num_draws: int
) -> tuple[DenseGaussian, list[float]]:
    """The Gaussian that maximises the ELBO, from one that is already near.

    In the coordinates in which q is standard normal, with draws ε and scores g, the residual r = g + ε vanishes where
    the target is q itself, and so does the noise of

        m ← m + ρ E[r],    P ← (I - ρ A) + ρ² A² / 2,    A = E[ε rᵀ], symmetrised,

    the natural-gradient step of the mean and of the precision by Price's theorem, with the second-order term that keeps
    P positive definite (Lin, Schmidt & Khan 2020). No Hessian is needed.

    Returns:
        the Gaussian, and the ELBO of each step by the draws of that step.

    References:
        Khan & Lin 2017, Conjugate-computation variational inference.
        Lin, Schmidt & Khan 2020, Handling the positive-definite constraint in the Bayesian learning rule, section 3.
        Roeder, Wu & Duvenaud 2017, Sticking the landing.
    """
    loc, root, log_det = start.loc, start.scale_tril, start.log_det
    D = len(loc)
    elbos = []
    for t in range(num_steps):
        fall = 0.5 * (1 + math.cos(math.pi * t / num_steps))
        rate = LAST_RATE + (FIRST_RATE - LAST_RATE) * fall
        noise = torch.randn(num_draws, D).to(loc)
        value, gradient = target(loc + noise @ root.mT)
        log_q = -noise.square().sum(-1) / 2 - log_det - D / 2 * math.log(2 * math.pi)
        elbos.append(truncated_elbo(value - log_q))
        finite = value.isfinite()
        residual = _clipped(torch.where(finite.unsqueeze(-1), gradient @ root + noise, 0.0))
        step, shift, log_precision = _step(noise, residual, rate)
        # Draws without density have no residual; if they are most of all, the scale is halved.
        usable = finite.double().mean() > LEAST_FINITE
        step = torch.where(usable, step, torch.eye(D).to(step) / 2)
        root = root @ step
        loc = loc + root @ torch.where(usable, shift, 0.0)
        log_det = log_det - torch.where(usable, log_precision / 2, D * math.log(2))
    return DenseGaussian(loc, tril_of_root(root)), torch.stack(elbos).tolist()


def _step(noise: Tensor, residual: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """P^{-1/2}, the shift P^{-1/2} ρ r̄ and log det P of one step from a standard normal."""
    mean = residual.mean(0)
    # E ε = 0, so that the mean of r contributes noise only.
    A = noise.mT @ (residual - mean) / (len(noise) - 1)
    a, Q = torch.linalg.eigh((A + A.mT) / 2)
    a = a.clamp(-MAX_CHANGE / rate, MAX_CHANGE / rate)
    precision = 1 - rate * a + (rate * a).square() / 2
    root = Q * precision.rsqrt()
    shift = rate * (root.mT @ mean)
    limit = MAX_SHIFT * math.sqrt(len(mean))
    shift = shift * (limit / shift.norm().clamp(min=limit))
    return root, shift, precision.log().sum()


def _clipped(residual: Tensor) -> Tensor:
    norm = residual.norm(dim=-1)
    limit = CLIP * norm.median().clamp(min=math.sqrt(residual.shape[-1]))
    return residual * (limit / torch.maximum(norm, limit)).unsqueeze(-1)
