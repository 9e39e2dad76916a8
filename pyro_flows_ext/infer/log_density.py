"""A model's log joint as a function on ℝᴰ: what optimisers and samplers need."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .particles import Program, _nesting, _sample_sites, log_prob_by_particle


class LogDensity:
    """u `(N, D)` -> log p(x, T(u)) + log|det T'(u)| `(N)`, in nats, with T from ℝᴰ to the supports of the latents.

    `sites`: latent name -> its site in a trace of the model, in the order in which they are laid out in u.
    `vectorized=False` runs the model once a row. -inf where the model gives NaN. Under a subsampled plate every call
    draws its own part of the data: `is_stochastic`.
    """

    def __init__(
        self,
        model: Program,
        sites: Sequence[tuple[str, Any]],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        vectorized: bool = True,
    ):
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self.vectorized = vectorized
        self._sites = list(sites)
        with torch.no_grad(), poutine.block():
            values = {name: site["value"] for name, site in self._sites}
            trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **self.kwargs)
        self._nesting = _nesting(trace)
        subsamples = [site for _, site in _sample_sites(trace) if site_is_subsample(site)]
        self.is_stochastic = any(len(site["value"]) < site["fn"].size for site in subsamples)

    @property
    def dim(self) -> int:
        """D."""
        return sum(self._unconstrained(site).numel() for _, site in self._sites)

    def __call__(self, u: Tensor) -> Tensor:
        if not self.vectorized and len(u) > 1:
            return torch.cat([self(row) for row in u.split(1)])
        values, ladj = self.constrain(u)
        num, model = len(u), self.model
        if self.vectorized:
            model = pyro.plate("num_particles_vectorized", num, dim=-self._nesting - 1)(model)
            values = {name: self._beside_plates(name, v) for name, v in values.items()}
        else:
            values = {name: value[0] for name, value in values.items()}
        with poutine.block(), pyro.validation_enabled(False), warnings.catch_warnings():
            # What has no density is told by its value.
            warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
            trace = poutine.trace(poutine.condition(model, values)).get_trace(
                *self.args, **self.kwargs
            )
            log_joint = log_prob_by_particle(trace, num) + ladj
        return torch.where(log_joint.isnan(), -torch.inf, log_joint)

    def with_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The log-density `(N)` and its gradient `(N, D)`; where one is not finite, -inf and 0."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self(u)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        finite = value.isfinite() & gradient.isfinite().all(-1)
        return (
            torch.where(finite, value.detach(), -torch.inf),
            torch.where(finite.unsqueeze(-1), gradient, 0.0),
        )

    def hessian(self, u: Tensor) -> Tensor:
        """The second derivatives `(D, D)` at one u `(D)`, in one pass of D copies."""
        with torch.enable_grad():
            copies = u.detach().expand(len(u), -1).clone().requires_grad_()
            (g,) = torch.autograd.grad(self(copies).sum(), copies, create_graph=True)
            (H,) = torch.autograd.grad(g.diagonal().sum(), copies)
        return (H + H.mT) / 2

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents T(u), site -> `(N, *shape)`, and log|det T'(u)| `(N)`."""
        values, ladjs, position = {}, [], 0
        for name, site in self._sites:
            shape, T = self._unconstrained(site), biject_to(site["fn"].support)
            part = u[:, position : position + shape.numel()].reshape(-1, *shape)
            position += shape.numel()
            values[name] = T(part)
            ladj = T.log_abs_det_jacobian(part, values[name])
            ladjs.append(sum_rightmost(ladj, ladj.dim() - 1))
        return values, torch.stack(ladjs).sum(0)

    @staticmethod
    def _unconstrained(site: Mapping[str, Any]) -> torch.Size:
        return biject_to(site["fn"].support).inverse_shape(site["value"].shape)

    def _beside_plates(self, name: str, value: Tensor) -> Tensor:
        """A batch of values with its first dimension left of all plates."""
        site = dict(self._sites)[name]
        gap = self._nesting - (site["value"].dim() - site["fn"].event_dim)
        return value.reshape(value.shape[0], *[1] * gap, *value.shape[1:])
