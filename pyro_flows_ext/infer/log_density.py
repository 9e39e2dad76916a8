"""A model's log joint as a function on ℝᴰ, with its derivatives: what optimisers and samplers need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..guides._log_density import JointDensity, nan_to_zero_density, nonfinite_ignored

__all__ = ["LogDensity", "nan_to_zero_density", "nonfinite_ignored", "value_and_gradient"]


class LogDensity(JointDensity):
    """u `(*, D)` -> log p(x, T(u)) + log|det T'(u)| `(*)`, with its derivatives: see `JointDensity`."""

    def with_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The log-density `(N)` and its gradient `(N, D)`; where one is not finite, -inf and 0."""
        return value_and_gradient(self, u)

    def hessian(self, u: Tensor) -> Tensor:
        """The second derivatives `(D, D)` at one u `(D)`, in one pass of D copies."""
        with torch.enable_grad():
            copies = u.detach().expand(len(u), -1).clone().requires_grad_()
            (g,) = torch.autograd.grad(self(copies).sum(), copies, create_graph=True)
            (H,) = torch.autograd.grad(g.diagonal().sum(), copies)
        return (H + H.mT) / 2


def value_and_gradient(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A log-density `(*)` at u `(*, D)` and its gradient `(*, D)`, detached; where one is not finite, -inf and 0."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        value = log_density(u)
        (gradient,) = torch.autograd.grad(value.sum(), u)
    finite = value.isfinite() & gradient.isfinite().all(-1)
    return (
        torch.where(finite, value.detach(), -torch.inf),
        torch.where(finite.unsqueeze(-1), gradient, 0.0),
    )
