"""Batch and match: Gaussians whose scores match those of the target, by updates in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .climb import ValueAndGradient
from .gaussian import DenseGaussian, Gaussian, tril_of_root

# A batch of which less than this share has a density says too little: the scale is halved instead.
LEAST_FINITE = 0.25
# ELBOs are compared between windows of so many batches; a gain below this is none, in nats.
WINDOW, LEAST_GAIN = 5, 0.05


class BatchAndMatch:
    """K Gaussians that run side by side, with one evaluation of the target for all of their draws.

    Each `step` draws B points of each Gaussian q, evaluates the scores g = ∇ log p and takes the Gaussian that minimises

        λ E_q ‖Σᵗ (∇ log p - ∇ log q)‖² on the batch + 2 KL(q_old, q),    λ = B D / (t + 1),

    which has a closed form and is exact for a Gaussian target after one batch of more than D draws. The update is
    computed in the coordinates in which q_old is standard normal: there all matrices are well conditioned, however
    badly scaled the target is. Draws without density are left out.

    Args:
        target: log-densities `(N)` and gradients `(N, D)` of points `(N, D)`; -inf and 0 without density.
        starts: the K Gaussians to begin with.
        num_draws: B.

    Attributes:
        elbos: a tensor `(K)` a batch: each Gaussian's ELBO by the draws of that batch, before its update, in nats.

    References:
        Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei & Saul 2024, Batch and match: black-box variational
        inference with a score-based divergence, algorithm 1.
    """

    def __init__(self, target: ValueAndGradient, starts: Sequence[Gaussian], num_draws: int):
        self.target, self.num_draws = target, num_draws
        self.loc = torch.stack([q.loc for q in starts])
        # Any square root of the covariance will do on the way, and needs no triangular form.
        self.root = torch.stack([q.scale_tril for q in starts])
        self.log_det = torch.stack([q.log_det for q in starts])
        self.elbos: list[Tensor] = []

    @torch.no_grad()
    def run(self, num_batches: int) -> list[Gaussian]:
        """At most so many batches, less when every Gaussian is level; returns the Gaussians."""
        for _ in range(num_batches):
            self.step()
            if self._is_level(num_batches):
                break
        return self.gaussians

    @property
    def gaussians(self) -> list[Gaussian]:
        """The K Gaussians as they are now."""
        return [
            DenseGaussian(loc, tril_of_root(root))
            for loc, root in zip(self.loc, self.root, strict=True)
        ]

    @torch.no_grad()
    def step(self) -> None:
        """One batch."""
        (K, D), B = self.loc.shape, self.num_draws
        noise = torch.randn(K, B, D).to(self.loc)
        z = self.loc.unsqueeze(1) + noise @ self.root.mT
        value, gradient = self.target(z.reshape(K * B, D))
        value, gradient = value.reshape(K, B), gradient.reshape(K, B, D) @ self.root
        log_q = -noise.square().sum(-1) / 2 - self.log_det.unsqueeze(-1)
        self.elbos.append(truncated_elbo(value - log_q + D / 2 * math.log(2 * math.pi)))
        finite = value.isfinite()
        rate = D * finite.sum(-1) / len(self.elbos)
        root, shift, usable = _matched(noise, gradient, finite, rate)
        self.loc = self.loc + (self.root @ shift.unsqueeze(-1)).squeeze(-1)
        self.root = torch.where(usable[:, None, None], self.root @ root, self.root / 2)
        log_det = torch.linalg.slogdet(root)[1]
        self.log_det = self.log_det + torch.where(usable, log_det, -D * math.log(2))

    def _is_level(self, num_batches: int) -> bool:
        """Whether no Gaussian still gains, or gains too slowly to reach the best one in the batches that are left."""
        if len(self.elbos) < 2 * WINDOW:
            return False
        recent = torch.stack(self.elbos[-2 * WINDOW :])
        before, now = recent[:WINDOW].mean(0), recent[WINDOW:].mean(0)
        noise = (recent[WINDOW:].var(0) / WINDOW).sqrt()
        gain = now - before
        windows_left = (num_batches - len(self.elbos)) / WINDOW
        hopeless = (now + gain.clamp(min=0) * windows_left < now.max()) | now.isinf()
        level = (gain < LEAST_GAIN) | (gain < noise)
        return bool((level | hopeless).all())


def _matched(
    noise: Tensor, gradient: Tensor, finite: Tensor, rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The update of standard normals: a root of the new covariance `(K, D, D)`, the new mean `(K, D)`, and whether it holds.

    With mean and covariance of the draws z̄, C and of their scores ḡ, Γ, the covariance Σ solves Σ U Σ + Σ = V for
    U = λ Γ + λ / (1 + λ) ḡ ḡᵀ and V = I + λ C + λ / (1 + λ) z̄ z̄ᵀ. Where it does not hold, the mean is 0.
    """
    identity = torch.eye(noise.shape[-1]).to(noise)
    count = finite.sum(-1)
    weight = (finite / count.clamp(min=1).unsqueeze(-1)).unsqueeze(-1)
    z_mean, g_mean = (weight * noise).sum(1), (weight * gradient).sum(1)
    z, g = ((x - m.unsqueeze(1)) for x, m in ((noise, z_mean), (gradient, g_mean)))
    lam = rate.to(noise)[:, None, None]
    part = lam / (1 + lam)
    U = lam * (weight * g).mT @ g + part * g_mean.unsqueeze(-1) * g_mean.unsqueeze(-2)
    V = lam * (weight * z).mT @ z + part * z_mean.unsqueeze(-1) * z_mean.unsqueeze(-2) + identity
    R = torch.linalg.cholesky(V)
    X = R.mT @ U @ R
    usable = (count > LEAST_FINITE * finite.shape[-1]) & X.isfinite().flatten(1).all(-1)
    X = torch.where(usable[:, None, None], X, identity)
    curvature, Q = torch.linalg.eigh((X + X.mT) / 2)
    # Σ = R Q diag(2 / (1 + √(1 + 4 x))) Qᵀ Rᵀ
    shrink = 2 / (1 + (1 + 4 * curvature.clamp(min=0)).sqrt())
    root = R @ Q * shrink.sqrt().unsqueeze(-2)
    mean = part.squeeze(-1) * ((root @ (root.mT @ g_mean.unsqueeze(-1))).squeeze(-1) + z_mean)
    return root, torch.where(usable.unsqueeze(-1), mean, 0.0), usable


def truncated_elbo(log_weights: Tensor) -> Tensor:
    """The ELBO of q restricted to where p has a density, `(*, B)` log p - log q -> `(*)`; -inf if that is less than half.

    That is the mean over these draws plus the log of their share.
    """
    finite = log_weights.isfinite()
    share = finite.double().mean(-1)
    mean = torch.where(finite, log_weights, 0.0).sum(-1) / finite.sum(-1).clamp(min=1)
    return torch.where(share >= 0.5, mean + share.clamp(min=0.5).log(), -torch.inf)
