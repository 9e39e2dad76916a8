"""Draws from a guide with their densities under model and guide: many at once where the model allows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Program = Callable[..., Any]

# The plate of particles that run at once, under the name that Pyro's own bounds give theirs.
PARTICLES = "num_particles_vectorized"


@dataclass(frozen=True)
class Particles:
    """Draws z_1 ... z_N of a guide q, weighed against a model p.

    `samples`: latent site -> `(N, *shape)`, constrained. `log_joint`: log p(x, z_n) `(N)`. `log_guide`: log q(z_n)
    `(N)`; with auxiliary guide sites, of the extended space. `log_likelihood`: observed site -> `(N, *batch)`, zero where masked.
    """

    samples: dict[str, Tensor]
    log_joint: Tensor
    log_guide: Tensor
    log_likelihood: dict[str, Tensor]

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
    chunk_size: int = 1000,
) -> Particles:
    """`num_samples` draws of the guide with their densities, `chunk_size` at a time.

    Where the model cannot run many particles in one pass (see `why_not_vectorized`), one at a time. Raises
    `ValueError` under a subsampled plate: weights of a random part of the data are no weights.
    """
    kwargs = kwargs or {}
    single = _traces(model, guide, args, kwargs)
    for name, site in _sample_sites(single[0]):
        if site_is_subsample(site):
            size, full_size = len(site["value"]), site["fn"].size
            if size < full_size:
                raise ValueError(
                    f"plate {name!r} subsamples {size} of {full_size}: expected the full data here; "
                    "call the model without subsample_size"
                )
    chunks = []
    if why_not_vectorized(model, guide, args, kwargs) is None:
        nesting = _nesting(*single)
        for start in range(0, num_samples, chunk_size):
            size = min(chunk_size, num_samples - start)
            traces = _traces(model, guide, args, kwargs, size, nesting)
            chunks.append(_collect(*traces, single, size, nesting))
    else:
        for _ in range(num_samples):
            traces = _traces(model, guide, args, kwargs)
            chunks.append(_collect(*traces, single, 1, None))
    return Particles(
        samples=_cat([c.samples for c in chunks]),
        log_joint=torch.cat([c.log_joint for c in chunks]),
        log_guide=torch.cat([c.log_guide for c in chunks]),
        log_likelihood=_cat([c.log_likelihood for c in chunks]),
    )


@torch.no_grad()
def why_not_vectorized(
    model: Program,
    guide: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> str | None:
    """None if the model computes the same log joint for particles in a batch as one by one; otherwise the reason.

    A model that sums over the wrong dimension does not fail when particles are added on the left, it is silently
    wrong; so three particles are scored both ways, at the same values.
    """
    kwargs = kwargs or {}
    num = 3
    single = _traces(model, guide, args, kwargs)
    nesting = _nesting(*single)
    try:
        model_trace, guide_trace = _traces(model, guide, args, kwargs, num, nesting)
        together = _collect(model_trace, guide_trace, single, num, nesting).log_joint
    except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
        return f"with a batch of particles the model raises {type(error).__name__}: {error}"
    subsample = {
        name: site["value"] for name, site in _sample_sites(model_trace) if site_is_subsample(site)
    }
    shapes = {name: site["value"].shape for name, site in _latents(single[1])}
    for i in range(num):
        values = {
            name: site["value"][i].reshape(shapes[name]) for name, site in _latents(guide_trace)
        }
        conditioned = poutine.condition(model, data={**values, **subsample})
        with poutine.block():
            alone = poutine.trace(conditioned).get_trace(*args, **kwargs).log_prob_sum()
        alone = torch.as_tensor(alone).to(together)
        if not torch.allclose(together[i], alone, rtol=1e-4, atol=1e-3, equal_nan=True):
            return (
                f"the log joint of a particle is {alone.item():.6g} alone and {together[i].item():.6g} in a batch; "
                "declare every independent dimension with pyro.plate and index from the right"
            )
    return None


def _traces(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_particles: int | None = None,
    nesting: int = 0,
) -> tuple[Trace, Trace]:
    """The model trace, replayed against the guide trace; with `num_particles`, in a plate left of all others."""

    def wrap(program: Program) -> Program:
        return program if num_particles is None else in_particles(program, num_particles, nesting)

    with poutine.block():
        guide_trace = poutine.trace(wrap(guide)).get_trace(*args, **kwargs)
        replayed = poutine.replay(wrap(model), trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def in_particles(program: Program, num: int, nesting: int) -> Program:
    """The program in a plate of `num` particles, left of its own `nesting` dimensions of plates."""
    return pyro.plate(PARTICLES, num, dim=-nesting - 1)(program)  # type: ignore[no-any-return]


@torch.no_grad()
def plate_nesting(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int:
    """How many plate dimensions model and guide use: `max_plate_nesting` of Pyro's ELBOs."""
    return _nesting(*_traces(model, guide, args, kwargs))


def _nesting(*traces: Trace) -> int:
    dims = [
        frame.dim
        for trace in traces
        for _, site in _sample_sites(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims) if dims else 0


def _sample_sites(trace: Trace) -> list[tuple[str, Any]]:
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]


def _latents(guide_trace: Trace) -> list[tuple[str, Any]]:
    return [
        (name, site)
        for name, site in _sample_sites(guide_trace)
        if not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary")
    ]


def _collect(
    model_trace: Trace,
    guide_trace: Trace,
    single: tuple[Trace, Trace],
    num: int,
    nesting: int | None,
) -> Particles:
    """One chunk of particles; `nesting=None` for a single particle without a plate of its own."""
    shapes = {name: site["value"].shape for name, site in _latents(single[1])}
    log_joint, log_guide = (
        log_prob_by_particle(model_trace, num),
        log_prob_by_particle(guide_trace, num),
    )
    # pyro.factor and pyro.deterministic are observed sites too, and observe no data.
    alone = dict(_sample_sites(single[0]))
    likelihood = {
        name: scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"]).reshape(
            num, *alone[name]["fn"].batch_shape
        )
        for name, site in _sample_sites(model_trace)
        if site["is_observed"]
        and not site_is_subsample(site)
        and not isinstance(site["fn"], dist.Unit)
        and not site["infer"].get("_deterministic")
    }
    return Particles(
        samples={
            name: site["value"].reshape(num, *shapes[name]) for name, site in _latents(guide_trace)
        },
        log_joint=log_joint,
        log_guide=log_guide,
        log_likelihood=likelihood,
    )


def log_prob_by_particle(trace: Trace, num: int) -> Tensor:
    """The log-density of a trace, scales and masks applied, of each of `num` particles: `(num)`."""
    trace.compute_log_prob()
    terms = [s["log_prob"] for _, s in _sample_sites(trace) if not site_is_subsample(s)]
    return torch.stack(
        [t.reshape(num, -1).sum(-1) if t.dim() else t.expand(num) for t in terms]
    ).sum(0)


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
