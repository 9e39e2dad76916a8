"""A model's log joint as a function on ℝᴰ: what optimisers and samplers need."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..guides._latents import Latent, read_latent, unpack
from .particles import Program, _nesting, _sample_sites, in_particles, log_prob_by_particle


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
        self._latents = [read_latent(name, site) for name, site in sites]
        with torch.no_grad(), poutine.block():
            values = {latent.name: latent.inside for latent in self._latents}
            trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **self.kwargs)
        self._nesting = _nesting(trace)
        subsamples = [site for _, site in _sample_sites(trace) if site_is_subsample(site)]
        self.is_stochastic = any(len(site["value"]) < site["fn"].size for site in subsamples)

    @property
    def dim(self) -> int:
        """D."""
        return sum(latent.unconstrained_shape.numel() for latent in self._latents)

    def __call__(self, u: Tensor) -> Tensor:
        if not self.vectorized and len(u) > 1:
            return torch.cat([self(row) for row in u.split(1)])
        values, ladj = self.constrain(u)
        num, model = len(u), self.model
        if self.vectorized:
            model = in_particles(model, num, self._nesting)
            values = {x.name: self._beside_plates(x, values[x.name]) for x in self._latents}
        else:
            values = {name: value[0] for name, value in values.items()}
        with poutine.block(), pyro.validation_enabled(False), nonfinite_ignored():
            trace = poutine.trace(poutine.condition(model, values)).get_trace(
                *self.args, **self.kwargs
            )
            log_joint = log_prob_by_particle(trace, num) + ladj
        return nan_to_zero_density(log_joint)

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

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents T(u), site -> `(N, *shape)`, and log|det T'(u)| `(N)`."""
        values, ladjs = {}, []
        for latent, value, ladj in unpack(u, self._latents):
            values[latent.name] = value
            ladjs.append(sum_rightmost(ladj, ladj.dim() - 1))
        return values, torch.stack(ladjs).sum(0)

    def _beside_plates(self, latent: Latent, value: Tensor) -> Tensor:
        """A batch of values with its first dimension left of all plates."""
        gap = self._nesting - (len(latent.shape) - latent.event_dim)
        return value.reshape(value.shape[0], *[1] * gap, *value.shape[1:])


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


def nan_to_zero_density(log_density: Tensor) -> Tensor:
    """-inf in place of NaN."""
    return torch.where(log_density.isnan(), -torch.inf, log_density)


@contextmanager
def nonfinite_ignored() -> Iterator[None]:
    """Without Pyro's warnings of log-densities that are not finite: for callers who look at the values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        yield
