"""The posterior as a guide gives it: weighted draws, and the coordinates in which chains start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ...guides import AutoFlow
from ...programs import LogJoint, Program, draw_particles, unconstrain
from ..importance import ImportanceResult, weigh
from ..refine import RefineResult, Start, start_at

# Particles at a time.
CHUNK = 500
# Particles of a lower bound on log q at a mode: it falls short by far less than what an uncovered mode lacks.
BOUND_PARTICLES = 200


class Posterior(Protocol):
    """Draws of a guide with their weights, and a start for chains."""

    def weigh(self, num: int) -> ImportanceResult:
        """`num` fresh draws with their weights."""

    def start(self, first: bool = False) -> tuple[LogJoint, Start]:
        """The log joint, and the coordinates and starts that the guide gives; `first`: before any training."""

    def log_prob(self, u: Tensor) -> Tensor | None:
        """log q of unconstrained latents `(K, D)`, or None where it is not known."""

    def chain_log_weights(self, refined: RefineResult) -> Tensor | None:
        """log p - log q of the draws of chains from `start`, `(C, S)`, or None where log q is not known."""


class FlowPosterior:
    """Of a flow guide over all latents, with the log joint that it was trained on.

    `is_placed`: whether a warm start has placed the guide. Before any training its flow is then near the identity.
    """

    def __init__(self, log_joint: LogJoint, guide: AutoFlow, is_placed: bool = False):
        self.log_joint, self.guide, self.is_placed = log_joint, guide, is_placed
        self.in_whitening = False  # the coordinates of the last start

    @torch.no_grad()
    def weigh(self, num: int) -> ImportanceResult:
        """`num` draws: one pass of the flow and one of the model, in chunks."""
        base, transform = self.guide.get_base_dist(), self.guide.get_transform()
        us, log_joints, log_guides = [], [], []
        for first in range(0, num, CHUNK):
            z = base.sample(torch.Size([min(CHUNK, num - first)]))
            u, ladj = transform.forward_and_ladj(z)
            us.append(u)
            log_joints.append(self.log_joint(u))
            log_guides.append(base.log_prob(z) - ladj)
        samples = self.log_joint.constrain(torch.cat(us))
        return weigh(samples, torch.cat(log_joints), torch.cat(log_guides))

    def start(self, first: bool = False) -> tuple[LogJoint, Start]:
        """The flow's own coordinates, or those of its whitening where the flow adds nothing but the time of a pass."""
        base, transform = self.guide.get_base_dist(), self.guide.get_transform()
        self.in_whitening = first and self.is_placed
        if not self.in_whitening:
            draw = lambda num: base.sample(torch.Size([num]))  # noqa: E731
            return self.log_joint, Start(transform, draw, "flow")
        whitening = self.guide.whitening

        def draw_whitened(num: int) -> Tensor:
            u = transform.forward_and_ladj(base.sample(torch.Size([num])))[0].detach()
            return whitening.inverse_and_ladj(u)[0]

        return self.log_joint, Start(whitening, draw_whitened, "affine")

    @torch.no_grad()
    def log_prob(self, u: Tensor) -> Tensor | None:
        return self.guide.get_posterior().log_prob(u)

    @torch.no_grad()
    def chain_log_weights(self, refined: RefineResult) -> Tensor | None:
        chains = refined.chains
        if self.in_whitening:
            log_p = chains.log_density - self.guide.whitening.forward_and_ladj(chains.z)[1]
            return log_p - self.guide.get_posterior().log_prob(chains.u)
        # The log-determinant of the flow is in both densities of z.
        return chains.log_density - self.guide.get_base_dist().log_prob(chains.z)


class GuidePosterior:
    """Of any guide with a density, weighed site by site."""

    def __init__(
        self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ):
        self.call = (model, guide, args, kwargs)

    def weigh(self, num: int) -> ImportanceResult:
        particles = draw_particles(*self.call, num_samples=num)
        return weigh(particles.samples, particles.log_joint, particles.log_guide)

    def start(self, first: bool = False) -> tuple[LogJoint, Start]:
        return start_at(*self.call)

    @torch.no_grad()
    def log_prob(self, u: Tensor) -> Tensor | None:
        """The lower bound of a guide that has one; None for others."""
        model, guide, args, kwargs = self.call
        bound: Any = getattr(guide, "log_prob_bound", None)
        if bound is None:
            return None
        target = LogJoint(model, args, kwargs)
        values = target.constrain(u)
        ladj = unconstrain(values, target.latents)[1]
        log_q: Tensor = bound(values, BOUND_PARTICLES, *args, **kwargs) + ladj
        return log_q

    def chain_log_weights(self, refined: RefineResult) -> Tensor | None:
        return None
