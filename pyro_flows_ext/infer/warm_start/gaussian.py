"""Gaussians on ℝᴰ with a dense scale, or one that is a diagonal times a low-rank change of the identity."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]


class Gaussian(ABC):
    """N(loc, A Aᵀ) with `loc` `(D)` and an invertible linear map A.

    Draws are `loc + A ε` for standard normal ε. `DenseGaussian` holds a lower triangular A, `LowRankGaussian` a diagonal
    and a few directions.
    """

    loc: Tensor

    @abstractmethod
    def scale(self, noise: Tensor) -> Tensor:
        """A ε, `(*, D)` -> `(*, D)`."""

    @abstractmethod
    def unscale(self, x: Tensor) -> Tensor:
        """A⁻¹ x, `(*, D)` -> `(*, D)`."""

    @abstractmethod
    def pull_back(self, gradient: Tensor) -> Tensor:
        """Aᵀ g, `(*, D)` -> `(*, D)`: a gradient in the coordinates of the noise."""

    @property
    @abstractmethod
    def log_det(self) -> Tensor:
        """log |det A|, a scalar tensor."""

    @property
    @abstractmethod
    def scale_tril(self) -> Tensor:
        """The lower triangular L `(D, D)` with L Lᵀ = A Aᵀ."""

    @abstractmethod
    def to(self, like: Tensor) -> Gaussian:
        """The same Gaussian in the dtype and on the device of `like`."""

    @property
    def dim(self) -> int:
        """D."""
        return len(self.loc)

    def draw(self, noise: Tensor) -> Tensor:
        """Draws from standard normal noise: `(*, D)` -> `(*, D)`."""
        return self.loc + self.scale(noise)

    def log_prob_of(self, noise: Tensor) -> Tensor:
        """The log-density at the draws from this noise: `(*, D)` -> `(*)`, in nats."""
        return -noise.square().sum(-1) / 2 - self.log_det - self.dim / 2 * math.log(2 * math.pi)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density at x: `(*, D)` -> `(*)`, in nats."""
        return self.log_prob_of(self.unscale(x - self.loc))

    @torch.no_grad()
    def elbo(self, target: LogDensity, noise: Tensor) -> float:
        """The mean of log p - log q over draws from the noise `(N, D)`, in nats; -inf where p vanishes at a draw."""
        bound = (target(self.draw(noise)) - self.log_prob_of(noise)).mean().item()
        return bound if math.isfinite(bound) else -math.inf


@dataclass(frozen=True)
class DenseGaussian(Gaussian):
    """N(loc, L Lᵀ) with `loc` `(D)` and the lower triangular L `(D, D)`, its `root`."""

    loc: Tensor
    root: Tensor

    @property
    def scale_tril(self) -> Tensor:
        return self.root

    def scale(self, noise: Tensor) -> Tensor:
        return noise @ self.root.mT

    def unscale(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.dim)
        solved = torch.linalg.solve_triangular(self.root, rows.mT, upper=False)
        return solved.mT.reshape(x.shape)

    def pull_back(self, gradient: Tensor) -> Tensor:
        return gradient @ self.root

    @property
    def log_det(self) -> Tensor:
        return self.root.diagonal().abs().log().sum()

    def to(self, like: Tensor) -> DenseGaussian:
        return DenseGaussian(self.loc.to(like), self.root.to(like))


@dataclass(frozen=True)
class LowRankGaussian(Gaussian):
    """N(loc, S (I + Q diag(λ) Qᵀ) S) with S = diag(`diagonal`), orthonormal columns Q and λ > -1.

    A = S (I + Q diag(√(1 + λ) - 1) Qᵀ) is a square root that maps ℝᴰ to itself at a cost of D r. A positive λ widens the
    Gaussian along a direction of S⁻¹ x, a negative one narrows it.

    Args:
        loc: the mean `(D)`.
        diagonal: positive scales `(D)`.
        basis: Q `(D, r)`; r = 0 gives a diagonal covariance.
        stretch: λ `(r)`.
    """

    loc: Tensor
    diagonal: Tensor
    basis: Tensor
    stretch: Tensor

    @staticmethod
    def isotropic(loc: Tensor, scale: float = 1.0) -> LowRankGaussian:
        """N(loc, scale² I)."""
        return LowRankGaussian(
            loc, torch.full_like(loc, scale), loc.new_zeros(len(loc), 0), loc.new_zeros(0)
        )

    def scale(self, noise: Tensor) -> Tensor:
        return self.diagonal * self._along(noise, (1 + self.stretch).sqrt() - 1)

    def unscale(self, x: Tensor) -> Tensor:
        return self._along(x / self.diagonal, (1 + self.stretch).rsqrt() - 1)

    def pull_back(self, gradient: Tensor) -> Tensor:
        return self._along(self.diagonal * gradient, (1 + self.stretch).sqrt() - 1)

    def _along(self, x: Tensor, gain: Tensor) -> Tensor:
        return x + (x @ self.basis * gain) @ self.basis.mT

    @property
    def log_det(self) -> Tensor:
        return self.diagonal.log().sum() + self.stretch.log1p().sum() / 2

    @property
    def scale_tril(self) -> Tensor:
        root = self.scale(torch.eye(self.dim).to(self.loc))  # row i is A eᵢ, so this is Aᵀ
        return tril_of_root(root.mT)

    def to(self, like: Tensor) -> LowRankGaussian:
        parts = (self.loc, self.diagonal, self.basis, self.stretch)
        return LowRankGaussian(*(part.to(like) for part in parts))


def tril_of_root(root: Tensor) -> Tensor:
    """The lower triangular L with L Lᵀ = A Aᵀ and a positive diagonal, by the QR decomposition of Aᵀ."""
    R = torch.linalg.qr(root.mT)[1]
    return (R * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT
