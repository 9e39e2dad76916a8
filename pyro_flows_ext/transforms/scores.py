"""Scores of a density carried through a transform: ∂ log q(y) / ∂y from ∂ log q(x) / ∂x, along the forward pass.

With J = ∂y/∂x and parameters held fixed, log q(y) = log q(x) - log|det J| gives

    ∂ log q(y) / ∂y = J⁻ᵀ (∂ log q(x) / ∂x - ∂ log|det J| / ∂x).

No inverse pass is needed (Vaitl, Nicoli, Nakajima & Kessel 2024, Fast and unified path gradient estimators for normalizing
flows). Every function here takes x and y in the graph of the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residual(x: Tensor, ladj: Tensor, score: Tensor) -> Tensor:
    """∂ log q(x) / ∂x - ∂ log|det J| / ∂x, detached: `(*, D)`."""
    if not ladj.requires_grad:
        return score
    (slope,) = torch.autograd.grad(ladj.sum(), x, retain_graph=True, allow_unused=True)
    return score if slope is None else score - slope


def pull_back(x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
    """Jᵀ v by one backward pass: `(*, D)`."""
    (pulled,) = torch.autograd.grad(y, x, vector, retain_graph=True)
    return pulled


def by_diagonal(x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
    """J⁻ᵀ v of an elementwise map."""
    return vector / pull_back(x, y, torch.ones_like(y))


def by_triangle(x: Tensor, y: Tensor, slope: Tensor, vector: Tensor) -> Tensor:
    """J⁻ᵀ v of a map whose J is triangular in some order of the elements, with diagonal `slope`, by Jacobi iteration.

    Exact after D iterations, since the rest of J is nilpotent; it ends when nothing changes beyond √eps, after some five
    iterations where the elements depend weakly on each other. One backward pass each.
    """
    tolerance = torch.finfo(vector.dtype).eps ** 0.5
    solution = vector / slope
    for _ in range(vector.shape[-1]):
        change = (vector - pull_back(x, y, solution)) / slope
        solution = solution + change
        if not bool(change.abs().amax() > tolerance * solution.abs().amax()):
            break
    return solution


def by_jacobian(x: Tensor, y: Tensor, vector: Tensor) -> Tensor:
    """J⁻ᵀ v of any map of vectors, from D backward passes in one batch."""
    D = y.shape[-1]
    eye = torch.eye(D, dtype=y.dtype, device=y.device)
    seeds = eye.reshape(D, *(1,) * (y.dim() - 1), D).expand(D, *y.shape)
    (rows,) = torch.autograd.grad(y, x, seeds, retain_graph=True, is_grads_batched=True)
    J = rows.movedim(0, -2)
    # Unchecked: a singular J gives a score that is not finite, as a flow that collapsed does anyway.
    return torch.linalg.solve_ex(J.mT, vector.unsqueeze(-1))[0].squeeze(-1)
