"""The log density of a model in the coordinates of a map from noise, and its gradient, for many chains at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...programs import value_and_gradient
from ...transforms import FlowTransform

# Rows of a batch in which any number may raise: below the least batch of which a `LogJoint` judges the share.
SMALL = 4


class Coordinates(Protocol):
    """A differentiable map from coordinates z `(*, D)` to unconstrained latents u `(*, D)`, with its log|det| `(*)`."""

    def forward_and_ladj(self, x: Tensor, /) -> tuple[Tensor, Tensor]: ...


class Identity(FlowTransform):
    """u = z: coordinates that are the unconstrained latents themselves."""

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.new_zeros(y.shape[:-1])


@dataclass(frozen=True)
class Point:
    """C positions: z `(C, D)`, their images u `(C, D)`, log density in z `(C)` and its gradient `(C, D)`."""

    z: Tensor
    u: Tensor
    log_density: Tensor
    gradient: Tensor

    @property
    def alive(self) -> Tensor:
        """Whether each row has a density above zero."""
        return self.log_density > -torch.inf

    def where(self, take: Tensor, other: Point) -> Point:
        """The rows of `other` where `take` `(C)`, else those of this."""
        rows = take.unsqueeze(-1)
        return Point(
            z=torch.where(rows, other.z, self.z),
            u=torch.where(rows, other.u, self.u),
            log_density=torch.where(take, other.log_density, self.log_density),
            gradient=torch.where(rows, other.gradient, self.gradient),
        )

    def __getitem__(self, rows: Tensor) -> Point:
        return Point(self.z[rows], self.u[rows], self.log_density[rows], self.gradient[rows])


class PulledBack:
    """log p(T(z)) + log|det T'(z)|, with its gradient: one evaluation of both for all rows.

    Rows where one of them is not finite have log density -inf and gradient zero. `num_gradients` counts evaluations.
    """

    def __init__(self, target: Callable[[Tensor], Tensor], transform: Coordinates | None):
        self.target = target
        self.transform = Identity() if transform is None else transform
        self.num_gradients = 0

    def __call__(self, z: Tensor) -> Point:
        self.num_gradients += 1
        # A trajectory that diverges overflows. Its rows have density zero; flows and models are evaluated elsewhere.
        usable = z.isfinite().all(-1, keepdim=True)
        with torch.enable_grad():
            z = torch.where(usable, z.detach(), 0.0).requires_grad_()
            u, ladj = self.transform.forward_and_ladj(z)
            rows = u.detach()
            safe = torch.where(rows.isfinite().all(-1, keepdim=True), rows, 0.0)
            value, gradient = self._value_and_gradient(safe)
            ladj = ladj.expand(z.shape[:-1])
            # As one number: `grad_outputs` imports sympy.
            (pulled,) = torch.autograd.grad((u * gradient.to(u)).sum() + ladj.sum(), z)
        log_density = value.to(z) + ladj.detach()
        finite = log_density.isfinite() & pulled.isfinite().all(-1)
        finite = finite & usable.squeeze(-1) & rows.isfinite().all(-1)
        return Point(
            z=z.detach(),
            u=rows,
            log_density=torch.where(finite, log_density, -torch.inf),
            gradient=torch.where(finite.unsqueeze(-1), pulled, 0.0),
        )

    def _value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return value_and_gradient(self.target, u)
        except ValueError:
            if self.num_gradients == 1:
                raise
        # The model raises for most rows of the batch, which means an error of the model at the starts, and a step that is
        # too long later on. In small parts a `LogJoint` gives those rows density zero whatever their share.
        parts = [value_and_gradient(self.target, part) for part in u.split(SMALL)]
        return torch.cat([v for v, _ in parts]), torch.cat([g for _, g in parts])
