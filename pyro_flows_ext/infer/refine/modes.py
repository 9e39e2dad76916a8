"""Modes of a posterior that a guide does not cover: chains that start from its draws do not reach them either."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A mode with less than this share of the mass of all is left unmentioned.
MIN_SHARE = 0.02
# Nats by which log q may lie below what the mode deserves. A guide that covers it with the wrong width or shape loses a
# few nats at the mode's peak; one that does not visit it loses tens.
MAX_DEFICIT = 5.0


@dataclass(frozen=True)
class UncoveredMode:
    """A local maximum of a log joint where the guide has too little density.

    Attributes:
        point: unconstrained latents `(D)`.
        log_joint: the log joint there, in nats.
        log_mass: Laplace's estimate of its evidence, log p + D/2 log 2π - 1/2 log det(-∇² log p), in nats.
        share: of the mass of all modes given together.
        deficit: by how many nats log q lies below log p - log Σ exp(log mass): its density, had it the mass that it deserves.
    """

    point: Tensor
    log_joint: float
    log_mass: float
    share: float = math.nan
    deficit: float = math.nan

    def describe(self, names: Sequence[str]) -> str:
        """The mode in words: its first latents and its share."""
        values = ", ".join(
            f"{n} = {float(v):.3g}" for n, v in zip(names[:3], self.point, strict=False)
        )
        more = ", ..." if len(names) > 3 else ""
        return f"a mode at {values}{more} with some {self.share:.0%} of the mass is not covered"


@torch.no_grad()
def uncovered(
    points: Tensor,
    log_joint: Tensor,
    log_mass: Tensor,
    guide_log_prob: Callable[[Tensor], Tensor],
    *,
    min_share: float = MIN_SHARE,
    max_deficit: float = MAX_DEFICIT,
) -> list[UncoveredMode]:
    """The modes with a real share of the mass where the guide's density is far below what they deserve, largest first.

        deficit = log p(mode) - log Σ_k exp(log_mass_k) - log q(mode)

    If q is the posterior and Laplace's approximation holds, the deficit is zero at every mode. Points that are one mode
    count once: those within one sd of each other would, but points of several ascents are taken as they come, so
    that callers pass distinct ones.

    Args:
        points: modes `(K, D)`, unconstrained; distinct.
        log_joint: the log joint at each, `(K)`.
        log_mass: Laplace's log mass of each, `(K)`; -inf or NaN where there is none.
        guide_log_prob: unconstrained latents `(K, D)` -> log q `(K)`, of the density on ℝᴰ; exact or a lower bound.
        min_share: the share of the mass below which a mode does not count.
        max_deficit: nats that log q may be below what a mode deserves.

    Raises:
        ValueError: for shapes that do not fit.
    """
    K = len(points)
    if points.dim() != 2 or log_joint.shape != (K,) or log_mass.shape != (K,):
        raise ValueError(
            f"expected points (K, D), log_joint (K) and log_mass (K), got {tuple(points.shape)}, "
            f"{tuple(log_joint.shape)} and {tuple(log_mass.shape)}"
        )
    if not K:
        return []
    log_mass = log_mass.double().nan_to_num(nan=-math.inf)
    total = log_mass.logsumexp(0)
    share = (log_mass - total).exp()
    deficit = log_joint.double() - total - guide_log_prob(points).double()
    return [
        UncoveredMode(
            points[k], float(log_joint[k]), float(log_mass[k]), float(share[k]), float(deficit[k])
        )
        for k in share.argsort(descending=True).tolist()
        if share[k] >= min_share and not deficit[k] <= max_deficit
    ]
