"""Pathfinder: the best of the Gaussians that L-BFGS passes through on its way to a mode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .climb import HISTORY, Path
from .gaussian import Gaussian, LogDensity, LowRankGaussian

# How many points of a path are judged, each by so many draws.
PATH_POINTS, PATH_DRAWS = 40, 10


@torch.no_grad()
def pathfinder(
    target: LogDensity, path: Path, *, num_points: int = PATH_POINTS, num_draws: int = PATH_DRAWS
) -> Gaussian | None:
    """The Gaussian of the highest ELBO among the quadratic approximations along a path.

    At a point θ of the path these are N(θ + H ∇ log p(θ), H), H the inverse Hessian estimated from the last 6 steps: a
    diagonal plus a low rank. Before the mode they see the bulk of a density whose mode lies elsewhere, as in a funnel.
    None for a path of a single point.

    References:
        Zhang, Carpenter, Gelman & Vehtari 2022, Pathfinder: Parallel quasi-Newton variational inference,
        algorithms 1 to 4.
    """
    candidates = quadratics(path)
    if not candidates:
        return None
    candidates = candidates[:: math.ceil(len(candidates) / num_points)]
    noise = torch.randn(num_draws, candidates[0].dim).to(path.points)
    log_p = target(torch.cat([q.draw(noise) for q in candidates])).reshape(len(candidates), -1)
    log_q = torch.stack([q.log_prob_of(noise) for q in candidates])
    bounds = (log_p - log_q).mean(-1).nan_to_num(nan=-torch.inf)
    return candidates[int(bounds.argmax())]


def quadratics(path: Path) -> list[LowRankGaussian]:
    """The quadratic approximations along the path, from its second point on."""
    alpha = torch.ones_like(path.points[0])
    steps: list[tuple[Tensor, Tensor]] = []
    found = []
    for i in range(1, len(path.points)):
        s = path.points[i] - path.points[i - 1]
        z = path.gradients[i - 1] - path.gradients[i]
        if s @ z > 1e-12 * z.square().sum():  # curvature of the right sign
            alpha = _updated_diagonal(alpha, s, z)
            steps = [*steps[1 - HISTORY :], (s, z)]
        if steps:
            gaussian = _quadratic(path.points[i], path.gradients[i], alpha, steps)
            if gaussian is not None:
                found.append(gaussian)
    return found


def _updated_diagonal(alpha: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """The diagonal estimate of the inverse Hessian after the step s that changed the gradient by z."""
    a, b, c = (alpha * z * z).sum(), (s * z).sum(), (s * s / alpha).sum()
    updated = 1 / (a / (b * alpha) + z * z / b - a * s * s / (b * c * alpha * alpha))
    return torch.where((updated > 0) & updated.isfinite(), updated, alpha)


def _quadratic(
    point: Tensor, gradient: Tensor, alpha: Tensor, steps: Sequence[tuple[Tensor, Tensor]]
) -> LowRankGaussian | None:
    """N(θ + H g, H) with H = diag(α) + β γ βᵀ, the compact form of L-BFGS (Byrd, Nocedal & Schnabel 1994).

    In the coordinates of √α, H is the identity plus a symmetric matrix on the span of the steps.
    """
    S, Z = (torch.stack(v, -1) for v in zip(*steps, strict=True))
    root = alpha.sqrt()
    S, Z = S / root.unsqueeze(-1), Z * root.unsqueeze(-1)
    R = (S.mT @ Z).triu()
    inverse_R = torch.linalg.solve_triangular(R, torch.eye(len(steps)).to(R), upper=True)
    B = R.diagonal().diag() + Z.mT @ Z
    Q, span = torch.linalg.qr(torch.cat([S, Z], -1))
    s, z = span.split(len(steps), -1)
    cross = z @ inverse_R @ s.mT
    inner = s @ inverse_R.mT @ B @ inverse_R @ s.mT - cross - cross.mT
    if not bool(inner.isfinite().all()):
        return None
    stretch, turn = torch.linalg.eigh((inner + inner.mT) / 2)
    # H is positive definite in exact arithmetic.
    if not bool((stretch > -1).all()):
        return None
    basis = Q @ turn
    q = LowRankGaussian(point, root, basis, stretch)
    loc = point + q.scale(q.pull_back(gradient))
    return LowRankGaussian(loc, root, basis, stretch) if bool(loc.isfinite().all()) else None
