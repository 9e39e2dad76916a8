"""Draws from a guide with their densities under model and guide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .arguments import check_finite_log_joint
from .latents import read_latent
from .log_joint import LogJoint
from .match import check_density, check_latents, subsampled_plates, traces_of
from .traces import (
    Program,
    in_particles,
    latent_sites,
    log_prob_by_particle,
    nesting_of,
    sample_sites,
)
from .vectorization import vectorization_error

# Particles of which the model is evaluated at once.
CHUNK = 1000


@dataclass(frozen=True)
class Particles:
    """Draws z_1 ... z_N of a guide q, weighed against a model p.

    `samples`: latent site -> `(N, *shape)`, constrained. `log_joint`: log p(x, z_n) `(N)`. `log_guide`: log q(z_n)
    `(N)`; with auxiliary guide sites, of the extended space. `log_likelihood`: observed site -> `(N, *batch)`, zero
    where masked.
    """

    samples: dict[str, Tensor]
    log_joint: Tensor
    log_guide: Tensor
    log_likelihood: dict[str, Tensor]
    num_raised: int = 0

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z_n) - log q(z_n), `(N)`: their mean is the ELBO, their log-mean-exp estimates log p(x)."""
        return self.log_joint - self.log_guide


@torch.no_grad()
def draw_particles(
    model: Program,
    guide: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int,
    chunk_size: int = CHUNK,
) -> Particles:
    """`num_samples` draws of the guide with their densities under guide and model, `chunk_size` at a time.

    The model is evaluated as a `LogJoint`; the guide runs in a batch of particles where that agrees with single runs,
    and one by one otherwise. Enumerated latents of the model are summed out.

    Raises:
        ValueError: under a subsampled plate, for a latent of the model that the guide does not draw and enumeration
            does not sum out, for one that the model observes, for a guide with points in place of draws, and for NaN
            or infinite arguments that the model does not mask.
    """
    kwargs = kwargs or {}
    check_finite_log_joint(model, args, kwargs)
    single = traces_of(model, guide, args, kwargs)
    for name, (size, full_size) in subsampled_plates(single[0]).items():
        raise ValueError(
            f"plate {name!r} subsamples {size} of {full_size}: expected the full data here; "
            "call the model without subsample_size"
        )
    check_latents(*single)
    check_density(*single, traces_of(model, guide, args, kwargs)[1])
    drawn = dict(latent_sites(single[1]))
    latents = [read_latent(n, s) for n, s in sample_sites(single[0]) if n in drawn]
    log_joint = LogJoint(model, args, kwargs, latents=latents)
    masked = [x.name for x in latents if drawn[x.name]["mask"] is not None]
    nesting: int | None = nesting_of(*single)
    if vectorization_error(_empty_model, guide, args, kwargs) is not None:
        nesting, chunk_size = None, 1
    chunks = []
    for start in range(0, num_samples, chunk_size):
        size = min(chunk_size, num_samples - start)
        program = guide if nesting is None else in_particles(guide, size, nesting)
        with poutine.block():
            trace = poutine.trace(program).get_trace(*args, **kwargs)
        nodes: dict[str, Any] = dict(trace.nodes)
        samples = {x.name: nodes[x.name]["value"].reshape(size, *x.shape) for x in latents}
        chunks.append((samples, log_prob_by_particle(trace, size)))
    samples = _cat([chunk[0] for chunk in chunks])
    log_joints, likelihoods = [], []
    for start in range(0, num_samples, CHUNK):
        values = {name: value[start : start + CHUNK] for name, value in samples.items()}
        total, likelihood = log_joint.at(values, masked=masked)
        log_joints.append(total)
        likelihoods.append(likelihood)
    return Particles(
        samples=samples,
        log_joint=torch.cat(log_joints),
        log_guide=torch.cat([chunk[1] for chunk in chunks]),
        log_likelihood=_cat(likelihoods),
        num_raised=log_joint.num_raised,
    )


def _empty_model(*args: Any, **kwargs: Any) -> None:
    """A model without sites, to examine a guide by itself."""


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
