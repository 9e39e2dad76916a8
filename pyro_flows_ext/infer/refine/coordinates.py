"""The coordinates in which chains run, and their starts, for any guide with draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor

from ...programs import LogJoint, Program, draw_particles, read_latent, unconstrain
from ...transforms import FlowTransform, Whitening
from .energy import Coordinates

# Draws behind the mean and covariance of a guide without a map from noise.
NUM_DRAWS = 2000
# A spread below this share of the largest one is that of a point.
POINT = 1e-12


@dataclass(frozen=True)
class Start:
    """The starts of chains and their coordinates.

    Attributes:
        transform: from coordinates z to unconstrained latents u, with `forward_and_ladj`.
        draw: a number n -> z `(n, D)`, distributed as the guide.
        kind: "flow" for the guide's own map from noise, "affine" for the mean and covariance of its draws.
    """

    transform: Coordinates
    draw: Callable[[int], Tensor]
    kind: str

    @torch.no_grad()
    def draw_latents(self, num: int) -> Tensor:
        """Unconstrained latents `(num, D)`, distributed as the guide."""
        return self.transform.forward_and_ladj(self.draw(num))[0]


class _TorchMap(FlowTransform):
    """Any torch transform of vectors as coordinates."""

    def __init__(self, transform: Any):
        super().__init__()
        self.wrapped = (transform,)  # in a tuple, for the parameters to stay the guide's

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (transform,) = self.wrapped
        y = transform(x)
        ladj = transform.log_abs_det_jacobian(x, y)
        return y, sum_rightmost(ladj, ladj.dim() - x.dim() + 1)


def start_at(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[LogJoint, Start]:
    """The model's log joint over the latents of a guide, and the coordinates and starts that the guide gives.

    An `AutoContinuous` guide with a map from noise, flows included, gives that map; the draws of any other one their mean
    and covariance.

    Raises:
        ValueError: for a guide without parameters yet, one whose draws are points, and a subsampled plate.
    """
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        raise ValueError(
            "guide: expected a trained guide, got one that has not been set up: train it first"
        )
    if isinstance(guide, AutoContinuous):
        sites = guide.prototype_trace.iter_stochastic_nodes()  # type: ignore[union-attr]
        target = LogJoint(model, args, kwargs, latents=[read_latent(n, s) for n, s in sites])
        _check_deterministic(target)
        start = _from_map(guide, args, kwargs)
        if start is None:
            start = _from_draws(_latents_of(guide, target, args, kwargs))
        return target, start
    target = LogJoint(model, args, kwargs)
    _check_deterministic(target)
    particles = draw_particles(model, guide, args, kwargs, num_samples=NUM_DRAWS)
    return target, _from_draws(unconstrain(particles.samples, target.latents)[0])


def _check_deterministic(target: LogJoint) -> None:
    if target.is_stochastic:
        raise ValueError(
            f"plates {target.subsampled} are subsampled: chains need the log joint of all data; call without subsample_size"
        )


def _from_map(
    guide: AutoContinuous, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Start | None:
    try:
        transform, base = guide.get_transform(*args, **kwargs), guide.get_base_dist()
    except (NotImplementedError, TypeError):  # none, or one that also takes auxiliary variables
        return None
    if not hasattr(transform, "forward_and_ladj"):
        transform = _TorchMap(transform)
    return Start(transform, lambda num: base.sample(torch.Size([num])).detach(), "flow")


@torch.no_grad()
def _latents_of(
    guide: Any, target: LogJoint, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    if hasattr(guide, "sample_posterior"):
        samples = guide.sample_posterior(NUM_DRAWS, *args, **kwargs)
        return unconstrain(samples, target.latents)[0]
    posterior = guide.get_posterior(*args, **kwargs)
    return posterior.sample(torch.Size([NUM_DRAWS]))


def _from_draws(u: Tensor) -> Start:
    """Coordinates whitened by mean and covariance of draws u `(N, D)`, those that are not finite left out.

    The covariance is shrunk towards its diagonal by D / N, at most all the way: with as many latents as draws its
    correlations are noise.
    """
    u = u.detach()
    u = u[u.isfinite().all(-1)]
    N, D = u.shape
    if N < 2:
        raise ValueError("guide: expected finite draws, got none; check its parameters")
    loc, spread = u.mean(0), u.var(0)
    if not bool((spread > POINT * loc.square().clamp(min=POINT)).all()):
        raise ValueError(
            "guide: expected a distribution, got points (a Delta); train AutoNormal or a flow, or draw starts by hand "
            "for run_chains"
        )
    share = min(1.0, D / N)
    centred = (u - loc).double()
    covariance = (1 - share) * (centred.mT @ centred) / (N - 1) + share * spread.double().diag()
    whitening = Whitening(loc, torch.linalg.cholesky(covariance).to(u))
    z = whitening.inverse_and_ladj(u)[0]

    def draw(num: int) -> Tensor:
        rows = torch.cat([torch.randperm(N, device=z.device) for _ in range(math.ceil(num / N))])
        return z[rows[:num]]

    return Start(whitening, draw, "affine")
