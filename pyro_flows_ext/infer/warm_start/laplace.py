"""The Laplace approximation: the Gaussian that has the target's mode and its curvature there."""

from __future__ import annotations

import torch
from torch import Tensor

from .gaussian import DenseGaussian, tril_of_root

# Curvatures below this share of the largest one are rounding: no direction is taken to be wider than their inverse.
LEAST_CURVATURE = 1e-10


def laplace(hessian: Tensor, mode: Tensor) -> DenseGaussian | None:
    """N(mode, (-∇² log p)⁻¹); None where the curvature is not that of a maximum, or not finite."""
    H = -hessian
    if not bool(H.isfinite().all()):
        return None
    curvature, Q = torch.linalg.eigh(H.double())
    if not bool(curvature[-1] > 0):
        return None
    curvature = curvature.clamp(min=LEAST_CURVATURE * curvature[-1].item())
    return DenseGaussian(mode, tril_of_root(Q * curvature.rsqrt()).to(mode))
