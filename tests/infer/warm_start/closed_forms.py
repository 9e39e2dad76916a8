"""Log densities on ℝᴰ with known answers, as the warm start takes them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Density:
    """A function `(N, D)` -> `(N)` with the methods of a target."""

    is_stochastic = False

    def __init__(self, log_density: Callable[[Tensor], Tensor], dim: int):
        self.log_density, self.dim = log_density, dim
        self.dtypes: set[torch.dtype] = set()
        self.num_rows = 0

    def __call__(self, u: Tensor) -> Tensor:
        self.dtypes.add(u.dtype)
        self.num_rows += len(u)
        value = self.log_density(u)
        return torch.where(value.isnan(), -torch.inf, value)

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self(u)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        finite = value.isfinite() & gradient.isfinite().all(-1)
        gradient = torch.where(finite.unsqueeze(-1), gradient, 0.0)
        return torch.where(finite, value.detach(), -torch.inf), gradient

    def hessian(self, u: Tensor) -> Tensor:
        return torch.autograd.functional.hessian(lambda x: self(x.unsqueeze(0))[0], u)


def normal(loc: Tensor, scale_tril: Tensor) -> Density:
    """N(loc, L Lᵀ), normalised."""

    def log_density(u: Tensor) -> Tensor:
        whitened = torch.linalg.solve_triangular(scale_tril.to(u), (u - loc.to(u)).mT, upper=False)
        volume = scale_tril.diagonal().log().sum() + len(loc) / 2 * math.log(2 * math.pi)
        return -whitened.square().sum(0) / 2 - volume

    return Density(log_density, len(loc))


def random_normal(dim: int, seed: int = 0, spread: float = 2.0) -> tuple[Density, Tensor, Tensor]:
    """A correlated normal with scales over `2 * spread` orders of magnitude; its mean and scale_tril."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(dim, dim, dtype=torch.float64, generator=generator) / math.sqrt(dim)
    scales = torch.logspace(-spread, spread, dim, dtype=torch.float64)
    scale_tril = torch.linalg.cholesky((noise @ noise.mT + torch.eye(dim)) * scales.outer(scales))
    loc = scales * torch.randn(dim, dtype=torch.float64, generator=generator)
    return normal(loc, scale_tril), loc, scale_tril


def funnel(dim: int = 4) -> Density:
    """Neal's funnel, v ~ N(0, 1.5²), x | v ~ N(0, e^v): normalised, without a maximum in reach of its mass."""

    def log_density(u: Tensor) -> Tensor:
        v, x = u[:, 0], u[:, 1:]
        prior = -(v / 1.5).square() / 2 - math.log(1.5)
        rest = -x.square().sum(-1) / (2 * v.exp()) - (dim - 1) * v / 2
        return prior + rest - dim / 2 * math.log(2 * math.pi)

    return Density(log_density, dim)


def banana(curvature: float = 0.5) -> Density:
    """x ~ N(0, 1), y | x ~ N(curvature (x² - 1), .5²), normalised."""

    def log_density(u: Tensor) -> Tensor:
        x, y = u[:, 0], u[:, 1]
        rest = (y - curvature * (x.square() - 1)) / 0.5
        return -x.square() / 2 - rest.square() / 2 - math.log(0.5) - math.log(2 * math.pi)

    return Density(log_density, 2)


def two_modes(distance: float = 10.0, weight: float = 0.2) -> Density:
    """(1 - w) N(0, I) + w N(distance · 1, .5² I) on the plane, normalised."""

    def log_density(u: Tensor) -> Tensor:
        first = math.log(1 - weight) - u.square().sum(-1) / 2
        second = math.log(weight) - (u - distance).square().sum(-1) / 0.5 - 2 * math.log(0.5)
        return torch.logaddexp(first, second) - math.log(2 * math.pi)

    return Density(log_density, 2)
