"""Runs of a model with its latents at given values, and the sum of its log densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .latents import Latent, to_support
from .masks import completing_log_prob, is_masked, masked_entries
from .supports import true_support
from .traces import Program, Site, nonfinite_ignored

Values = Mapping[str, Tensor]


def leaf(site: Site) -> Tensor:
    """The trained tensor behind a parameter site."""
    unconstrained = getattr(site["value"], "unconstrained", None)
    trained = None if unconstrained is None else unconstrained()
    return site["value"] if trained is None else trained


class Substitute(Messenger):
    """Puts latents at given values, constrained or not, and plates at given subsamples."""

    def __init__(
        self,
        values: Values,
        unconstrained: Values | None = None,
        latents: Mapping[str, Latent] | None = None,
        *,
        fixed: Values | None = None,
        batch_dim: int | None = None,
    ):
        super().__init__()
        self.values, self.unconstrained = values, unconstrained or {}
        self.names, self.fixed, self.batch_dim = latents or {}, fixed or {}, batch_dim
        self.ladjs: list[Tensor] = []
        self.latents: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.fixed and site_is_subsample(msg):
            msg["value"] = self.fixed[name]
        elif msg["is_observed"] or msg["done"]:
            return
        elif name in self.values:
            value = self.values[name]
            if self.batch_dim is not None:
                value = self._beside_plates(name, value)
            msg["value"], msg["done"] = value, True
        elif name in self.unconstrained:
            part, latent = self.unconstrained[name], self.names[name]
            if self.batch_dim is not None:
                part = self._beside_plates(name, part)
            value, ladj = to_support(part, true_support(name, msg["fn"]), latent.event_dim)
            self.ladjs.append(ladj)
            shape = latent.shape if self.batch_dim is None else (len(part), *latent.shape)
            self.latents[name] = value.reshape(shape)
            msg["value"], msg["done"] = value, True

    def _beside_plates(self, name: str, value: Tensor) -> Tensor:
        """A batch of values with its first dimension at `batch_dim` of the site's batch shape."""
        latent = self.names[name]
        gap = -1 - self.batch_dim - (len(latent.shape) - latent.event_dim)  # type: ignore[operator]
        if gap < 0:
            raise ValueError(
                f"latent {name!r} has more batch dimensions than there are plates around it"
            )
        return value.reshape(len(value), *[1] * gap, *value.shape[1:])


class Total(Messenger):
    """Adds up the log densities of all sites, scaled and masked: a scalar, or one value for each of `num` particles."""

    def __init__(self, num: int | None, nesting: int, completed: frozenset[str], collect: bool):
        super().__init__()
        self.num, self.nesting, self.completed, self.collect = num, nesting, completed, collect
        self.terms: list[Tensor] = []
        self.sites: dict[str, Tensor] = {}
        self.parameters: list[Tensor] = []

    @property
    def value(self) -> Tensor:
        total = self.terms[0]
        for term in self.terms[1:]:
            total = total + term
        return total

    def add(self, log_prob: Tensor) -> None:
        if self.num is None or log_prob.dim() <= self.nesting:
            self.terms.append(log_prob.sum())
        elif log_prob.dim() > self.nesting + 1:
            raise ValueError(
                f"a log density has {log_prob.dim()} batch dimensions for particles within {self.nesting} plates; declare "
                "every batch dimension by pyro.plate"
            )
        else:
            self.terms.append(log_prob.flatten(1).sum(-1) if log_prob.dim() > 1 else log_prob)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.add(scale_and_mask(log_prob, msg["scale"], msg["mask"]))
        if msg["name"] in self.completed:
            self.add(completing_log_prob(msg))
        if self.collect and msg["is_observed"] and not isinstance(msg["fn"], dist.Unit):
            likelihood = scale_and_mask(log_prob, 1.0, msg["mask"])
            if self.num is not None and likelihood.dim() <= self.nesting:
                likelihood = likelihood.expand(self.num, *likelihood.shape)
            self.sites[msg["name"]] = likelihood

    def _pyro_post_param(self, msg: Any) -> None:
        self.parameters.append(leaf(msg))


def completed_latents(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    latents: Sequence[Latent],
    trace: Trace,
) -> frozenset[str]:
    """The latents masked in a trace whose masked entries nothing else depends on: those can have the density of their prior."""
    masked = [x.name for x in latents if is_masked(trace.nodes[x.name])]
    if not masked:
        return frozenset()
    points = {x.name: x.inside.detach().clone().requires_grad_() for x in latents}
    with torch.enable_grad(), poutine.block(), nonfinite_ignored():
        replayed = poutine.trace(Substitute(points)(model)).get_trace(*args, **kwargs)
        total = torch.as_tensor(replayed.log_prob_sum())
        if not total.requires_grad:
            return frozenset(masked)
        grads = torch.autograd.grad(
            total, list(points.values()), allow_unused=True, materialize_grads=True
        )
    gradients = dict(zip(points, grads, strict=True))
    return frozenset(
        name
        for name in masked
        if not bool((gradients[name] * masked_entries(replayed.nodes[name])).any())
    )


def value_and_gradient(log_density: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A log density `(*)` at u `(*, D)` and its gradient `(*, D)`, detached; where one is not finite, -inf and 0."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        value = log_density(u)
        if not value.requires_grad:  # every particle raised
            return value.detach(), torch.zeros_like(u)
        (gradient,) = torch.autograd.grad(value.sum(), u)
    finite = value.isfinite() & gradient.isfinite().all(-1)
    return (
        torch.where(finite, value.detach(), -torch.inf),
        torch.where(finite.unsqueeze(-1), gradient, 0.0),
    )
