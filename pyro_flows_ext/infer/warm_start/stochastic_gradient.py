"""Stochastic-gradient ascent of the ELBO of a Gaussian, for targets that are random themselves."""

from __future__ import annotations

import math

import torch

from .._adam import Adam
from .climb import ValueAndGradient
from .gaussian import DenseGaussian, Gaussian

MAX_NORM = 10.0


def stochastic_gradient(
    target: ValueAndGradient,
    start: Gaussian,
    *,
    full_rank: bool,
    num_steps: int,
    num_draws: int = 32,
    lr: float = 0.05,
    initial_scale: float = 1.0,
) -> DenseGaussian:
    """The Gaussian that maximises the ELBO, by Adam from `start`, in whose whitened coordinates it moves.

    Adam scales each parameter by the noise of its gradient, which natural gradients do not: under a subsampled plate that
    noise stays at the optimum. The parameters are held fixed in log q (Sticking the Landing). Draws without density are
    left out of a step.

    Args:
        target: log-densities `(N)` and gradients `(N, D)` of points `(N, D)`; -inf and 0 without density.
        start: the Gaussian whose coordinates are used.
        full_rank: a lower triangular scale in those coordinates, or a diagonal one.
        num_steps, num_draws, lr: steps of Adam, draws a step, and its first rate, which falls to a hundredth of it.
        initial_scale: the diagonal of the scale at first.

    References:
        Kucukelbir, Tran, Ranganath, Gelman & Blei 2017, Automatic differentiation variational inference.
        Roeder, Wu & Duvenaud 2017, Sticking the landing.
    """
    D = start.dim
    m, log_s = torch.zeros_like(start.loc), torch.full_like(start.loc, math.log(initial_scale))
    T = start.loc.new_zeros(D, D) if full_rank else start.loc.new_zeros(0, 0)
    parameters = [m, log_s, T] if full_rank else [m, log_s]
    for p in parameters:
        p.requires_grad_()
    optimizer = Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, 0.01 * lr)
    for _ in range(num_steps):
        noise = torch.randn(num_draws, D).to(m)
        s = log_s.exp()
        scale = T.tril(-1) + torch.diag(s) if full_rank else s
        w = m + (noise @ scale.mT if full_rank else noise * s)  # whitened by the start
        value, gradient = target(start.draw(w.detach()))
        # The path derivative of log p - log q at w: noise = scale⁻¹ (w - m), so that -∇ log q = scale⁻ᵀ noise.
        path = start.pull_back(gradient)
        path = path + (
            torch.linalg.solve_triangular(scale.detach(), noise, upper=False, left=False)
            if full_rank
            else noise / s.detach()
        )
        weight = value.isfinite().to(m) / num_draws
        for p in parameters:
            p.grad = None
        (w * (-path * weight.unsqueeze(-1))).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        s = log_s.exp()
        root = start.scale_tril
        root = root @ (T.tril(-1) + torch.diag(s)) if full_rank else root * s
        return DenseGaussian(start.draw(m), root)
