"""Gaussian approximations of a density on ℝᴰ: by stochastic gradients, at a mode, and along the path to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..programs import LogJoint

# Curvatures below this share of the largest one are rounding: no direction is taken to be wider than their inverse says.
LEAST_CURVATURE = 1e-10
# Pairs of steps that L-BFGS remembers; how many points of its path are judged, each by so many draws.
HISTORY, PATH_POINTS, PATH_DRAWS = 6, 40, 10
MAX_ITERATIONS = 300
# What a line search sees where the density is zero: far below anything a model returns.
WALL = 1e30


@dataclass(frozen=True)
class Gaussian:
    """N(loc, L Lᵀ) with `loc` `(D)` and `scale_tril` L `(D, D)`."""

    loc: Tensor
    scale_tril: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Draws from standard normal noise: `(N, D)` -> `(N, D)`."""
        return self.loc + noise @ self.scale_tril.mT

    def elbo(self, target: LogJoint, noise: Tensor) -> float:
        """The mean of log p - log q over draws from the given noise `(N, D)`, in nats; -inf where p vanishes."""
        with torch.no_grad():
            bound = (target(self.draw(noise)) - self.log_prob_of(noise)).mean().item()
        return bound if math.isfinite(bound) else -math.inf

    def log_prob_of(self, noise: Tensor) -> Tensor:
        """The log-density at the draws from this noise: `(N, D)` -> `(N)`."""
        normalizer = self.scale_tril.diagonal().log().sum() + len(self.loc) / 2 * math.log(
            2 * math.pi
        )
        return -noise.square().sum(-1) / 2 - normalizer


def fit_gaussian(
    target: LogJoint,
    start: Gaussian,
    *,
    full_rank: bool,
    num_steps: int,
    num_particles: int = 32,
    lr: float = 0.05,
    initial_scale: float = 1.0,
) -> Gaussian:
    """The Gaussian that maximises the ELBO, by Adam from `start`, in whose whitened coordinates it moves.

    `full_rank=False` trains a diagonal scale in those coordinates; `initial_scale` is where the diagonal begins. The
    parameters are held fixed in log q (Roeder, Wu & Duvenaud 2017, Sticking the Landing), so that the noise of the gradient
    dies out where the target is Gaussian. Particles of no density are left out of a step. Source: Kucukelbir et al. 2017, Automatic
    Differentiation Variational Inference.
    """
    D = len(start.loc)
    m, log_s = torch.zeros_like(start.loc), torch.full_like(start.loc, math.log(initial_scale))
    T = torch.zeros_like(start.scale_tril)
    parameters = [m, log_s, T] if full_rank else [m, log_s]
    for p in parameters:
        p.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, 0.01 * lr)
    for _ in range(num_steps):
        noise = torch.randn(num_particles, D, dtype=m.dtype, device=m.device)
        scale = T.tril(-1) + torch.diag(log_s.exp())
        w = m + noise @ scale.mT  # whitened by the start
        value, gradient = target.value_and_gradient(start.draw(w.detach()))
        # The path derivative of log p - log q at w: noise = scale⁻¹ (w - m), so that -∇ log q = scale⁻ᵀ noise.
        path = gradient @ start.scale_tril
        path = path + torch.linalg.solve_triangular(scale.detach(), noise, upper=False, left=False)
        weight = value.isfinite().to(m) / num_particles
        optimizer.zero_grad()
        w.backward(-path * weight.unsqueeze(-1))
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        scale = T.tril(-1) + torch.diag(log_s.exp())
        return Gaussian(start.draw(m.unsqueeze(0))[0], start.scale_tril @ scale)


def climb(target: LogJoint, start: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The points of an L-BFGS ascent from `start` `(D)`, and the gradients there. The last one is the best.

    Empty where the density vanishes at the start.
    """
    from scipy.optimize import minimize

    seen: dict[bytes, Tensor] = {}

    def negative(u):  # type: ignore[no-untyped-def]
        value, gradient = target.value_and_gradient(torch.as_tensor(u).to(start).unsqueeze(0))
        seen[u.tobytes()] = gradient[0]
        height = value.item()
        return (-height if math.isfinite(height) else WALL), -gradient[0].double().cpu().numpy()

    points: list[Tensor] = []
    gradients: list[Tensor] = []

    def record(u) -> None:  # type: ignore[no-untyped-def]
        if u.tobytes() in seen:
            points.append(torch.as_tensor(u.copy()).to(start))
            gradients.append(seen[u.tobytes()])

    u = start.double().cpu().numpy()
    value, _ = negative(u)
    if value == WALL:
        return [], []
    record(u)
    options = {"maxcor": HISTORY, "ftol": 1e-14, "gtol": 1e-8, "maxiter": MAX_ITERATIONS}
    minimize(negative, u, jac=True, method="L-BFGS-B", callback=record, options=options)
    return points, gradients


def laplace(target: LogJoint, mode: Tensor) -> Gaussian | None:
    """N(mode, (-∇² log p)⁻¹); None where the curvature is not that of a maximum, or not finite."""
    H = -target.hessian(mode)
    if not bool(H.isfinite().all()):
        return None
    curvature, Q = torch.linalg.eigh(H.double())
    if not bool(curvature[-1] > 0):
        return None
    curvature = curvature.clamp(min=LEAST_CURVATURE * curvature[-1].item())
    # L with L Lᵀ = Q diag(1 / curvature) Qᵀ, by the QR decomposition of its transposed root.
    R = torch.linalg.qr((Q * curvature.rsqrt()).mT)[1]
    return Gaussian(mode, (R * R.diagonal().sign().unsqueeze(-1)).mT.to(mode))


def pathfinder(
    target: LogJoint, points: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Gaussian | None:
    """The Gaussian of the highest ELBO among the quadratic approximations that L-BFGS makes on its way to a mode.

    At a point θ of the path these are N(θ + H ∇ log p(θ), H), H the inverse Hessian estimated from the last 6 steps: a
    diagonal plus a low rank. Before the mode they see the bulk of a density whose mode lies elsewhere, as in a funnel.
    None for a path of a single point. Source: Zhang, Carpenter, Gelman & Vehtari 2022, Pathfinder: Parallel
    quasi-Newton variational inference, algorithms 1 to 4.
    """
    candidates = list(_quadratics(points, gradients))
    if not candidates:
        return None
    candidates = candidates[:: math.ceil(len(candidates) / PATH_POINTS)]
    noise = torch.randn(PATH_DRAWS, len(points[0]), dtype=points[0].dtype, device=points[0].device)
    with torch.no_grad():
        log_p = target(torch.cat([q.draw(noise) for q in candidates])).reshape(len(candidates), -1)
    bounds = [
        (row - q.log_prob_of(noise)).mean().item() for row, q in zip(log_p, candidates, strict=True)
    ]
    finite = [b if math.isfinite(b) else -math.inf for b in bounds]
    return candidates[finite.index(max(finite))]


def _quadratics(points: Sequence[Tensor], gradients: Sequence[Tensor]):  # type: ignore[no-untyped-def]
    alpha = torch.ones_like(points[0])
    steps: list[tuple[Tensor, Tensor]] = []
    for i in range(1, len(points)):
        s, z = points[i] - points[i - 1], gradients[i - 1] - gradients[i]
        if s @ z > 1e-12 * z.square().sum():  # curvature of the right sign
            alpha = _updated_diagonal(alpha, s, z)
            steps = [*steps[1 - HISTORY :], (s, z)]
        if not steps:
            continue
        H = _inverse_hessian(alpha, steps)
        L, failed = torch.linalg.cholesky_ex(H)
        loc = points[i] + H @ gradients[i]
        if not failed and bool(loc.isfinite().all()) and bool(L.isfinite().all()):
            yield Gaussian(loc, L)


def _updated_diagonal(alpha: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """The diagonal estimate of the inverse Hessian after the step s that changed the gradient by z."""
    a, b, c = (alpha * z * z).sum(), (s * z).sum(), (s * s / alpha).sum()
    updated = 1 / (a / (b * alpha) + z * z / b - a * s * s / (b * c * alpha * alpha))
    return torch.where((updated > 0) & updated.isfinite(), updated, alpha)


def _inverse_hessian(alpha: Tensor, steps: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """H = diag(α) + β γ βᵀ of the compact form of L-BFGS (Byrd, Nocedal & Schnabel 1994)."""
    S, Z = (torch.stack(v, -1) for v in zip(*steps, strict=True))
    R = (S.mT @ Z).triu()
    AZ = alpha.unsqueeze(-1) * Z
    inverse_R = torch.linalg.solve_triangular(R, torch.eye(len(steps)).to(R), upper=True)
    B = R.diagonal().diag() + Z.mT @ AZ
    low_rank = S @ inverse_R.mT @ B @ inverse_R @ S.mT
    cross = AZ @ inverse_R @ S.mT
    H = alpha.diag() + low_rank - cross - cross.mT
    return (H + H.mT) / 2
