"""Losses of a guide with their gradients: any Pyro ELBO, or the path gradient of the ELBO on a log joint."""

from __future__ import annotations

import math
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from torch import Tensor

from ...guides import AutoFlow
from ...programs import LogJoint, Program, SparseSubsample, recorded_parameters
from ..elbo.path_gradients import draw_with_density

# Below this share of particles with a finite density a step has too little to go by, and is skipped.
LEAST_FINITE = 0.5


class Objective(Protocol):
    """A loss whose gradients are added to the `.grad` of its parameters."""

    def __call__(self) -> tuple[float, list[Tensor]]:
        """The loss in nats and the parameters that it depends on; their gradients are added to `.grad`."""


class ELBOObjective:
    """A Pyro ELBO of model and guide on fixed arguments."""

    def __init__(
        self,
        loss: Any,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self.loss, self.model, self.guide = loss, model, guide
        self.args, self.kwargs = args, kwargs
        self.named: dict[str, Tensor] = {}

    def __call__(self) -> tuple[float, list[Tensor]]:
        with SparseSubsample(), recorded_parameters() as self.named:
            value = self.loss.loss_and_grads(self.model, self.guide, *self.args, **self.kwargs)
        return float(value), list({id(p): p for p in self.named.values()}.values())


class PathObjective:
    """Minus the ELBO of a flow guide over all latents, by path gradients, from `num_particles` draws.

    ∇ E_q [log p(x, z) - log q(z)] with the parameters held fixed in log q: the noise of this gradient vanishes where q is
    the posterior. Particles of density zero are left out of a step. The model's parameters get their ordinary gradient.

    References:
        Roeder, Wu & Duvenaud 2017, Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
        Inference.
    """

    def __init__(self, log_joint: LogJoint, guide: AutoFlow, num_particles: int):
        self.log_joint, self.guide, self.num_particles = log_joint, guide, num_particles

    def __call__(self) -> tuple[float, list[Tensor]]:
        base = self.guide.get_base_dist().expand(torch.Size([self.num_particles]))
        posterior = dist.TransformedDistribution(base, [self.guide.get_transform()])
        live, cut, log_q = draw_with_density(posterior)
        log_p = self.log_joint(cut)
        own = [p for p in self.log_joint.parameters if p.requires_grad]
        (score_q,) = torch.autograd.grad(log_q.sum(), cut)
        if not log_p.requires_grad:  # every particle raised
            return math.inf, [*self.guide.parameters(), *own]
        finite = log_p.isfinite()
        num_summed = finite.sum().clamp(min=1)
        gradients = torch.autograd.grad(
            torch.where(finite, log_p, 0.0).sum(), [cut, *own], allow_unused=True
        )
        finite = finite & gradients[0].isfinite().all(-1)
        share = finite.to(log_q) / finite.sum().clamp(min=1)
        signal = torch.where(finite.unsqueeze(-1), gradients[0] - score_q, 0.0)
        (live * (-signal * share.unsqueeze(-1))).sum().backward()
        for p, g in zip(own, gradients[1:], strict=True):
            if g is not None:
                p.grad = (0.0 if p.grad is None else p.grad) - g / num_summed
        bound = torch.where(finite, log_p - log_q, 0.0).detach() * share
        enough = finite.sum() >= LEAST_FINITE * self.num_particles
        loss = torch.where(enough, -bound.sum(), math.inf)
        return float(loss), [*self.guide.parameters(), *own]
