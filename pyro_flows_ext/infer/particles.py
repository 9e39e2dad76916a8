"""Draws from a guide with their densities under model and guide: many at once where the model allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..guides._log_density import (
    PARTICLES,
    Program,
    _nesting,
    _sample_sites,
    in_particles,
    log_prob_by_particle,
)
from .path_gradients import is_delta

__all__ = [
    "PARTICLES",
    "Particles",
    "Program",
    "draw_particles",
    "in_particles",
    "log_prob_by_particle",
    "plate_nesting",
    "why_not_vectorized",
]


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
    """None if model and guide compute the same for particles in a batch as one by one; otherwise the reason.

    One that sums over the wrong dimension does not fail when particles are added on the left, it is silently wrong; so
    three particles of the guide are scored both ways by both, at the same values, auxiliary ones included. A guide that
    is a module is in evaluation mode for this: with dropout no two runs are the same.
    """
    kwargs = kwargs or {}
    num = 3
    with _evaluation_mode(guide), poutine.block():
        single = _traces(model, guide, args, kwargs)
        nesting = _nesting(*single)
        many_guide = in_particles(guide, num, nesting)
        many_model = in_particles(model, num, nesting)
        who = "guide"
        try:
            drawn = _random_values(poutine.trace(many_guide).get_trace(*args, **kwargs))
            # Again at these values, as alone: a flow would score its own draw by the pass that drew it.
            guide_trace = _at(many_guide, drawn, args, kwargs)
            alone = [_at(guide, v, args, kwargs) for v in _split(drawn, single[1], num)]
            who = "model"
            replayed = poutine.replay(many_model, trace=guide_trace)
            model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
            together = _collect(model_trace, guide_trace, single, num, nesting)
        except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
            return f"with a batch of particles the {who} raises {type(error).__name__}: {error}"
        return _difference(model, together, model_trace, alone, args, kwargs)


def _difference(
    model: Program,
    together: Particles,
    model_trace: Trace,
    alone: list[Trace],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    """What differs between particles in a batch and the runs of each alone, those of the guide being given."""
    advice = "declare every independent dimension with pyro.plate and index from the right"
    subsample = {
        name: site["value"] for name, site in _sample_sites(model_trace) if site_is_subsample(site)
    }
    for i, guide_trace in enumerate(alone):
        values = {name: value[i] for name, value in together.samples.items()}
        conditioned = poutine.condition(model, data={**values, **subsample})
        model_alone = poutine.trace(conditioned).get_trace(*args, **kwargs)
        for name, site in _latents(guide_trace):
            if not _close(values[name], site["value"], 1e-3):
                return f"the guide draws another {name!r} for a particle alone than in a batch of the same; {advice}"
        # Inverses of flows cost the guide some digits.
        for what, of_batch, of_one, rtol, atol in (
            ("log joint", together.log_joint[i], model_alone.log_prob_sum(), 1e-4, 1e-3),
            ("guide's log density", together.log_guide[i], guide_trace.log_prob_sum(), 1e-3, 1e-2),
        ):
            one = torch.as_tensor(of_one).to(of_batch)
            if not torch.allclose(of_batch, one, rtol=rtol, atol=atol, equal_nan=True):
                numbers = f"{one.item():.6g} alone and {of_batch.item():.6g} in a batch"
                return f"the {what} of a particle is {numbers}; {advice}"
    return None


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two values are the same up to this share of the largest number in them."""
    a, b = a.float(), b.float()
    largest = float(a.abs().nan_to_num().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _random_values(guide_trace: Trace) -> Trace:
    """The sites of a guide at which something is drawn, at copies of their values: no cache knows those.

    What a `Delta` holds follows from the draws.
    """
    drawn = Trace()
    for name, site in _sample_sites(guide_trace):
        if not site["is_observed"] and not is_delta(site["fn"]):
            drawn.add_node(name, **{**site, "value": site["value"].clone()})
    return drawn


def _split(drawn: Trace, single: Trace, num: int) -> list[Trace]:
    """The draws of each particle alone, in the shapes of a run without particles."""
    traces = [Trace() for _ in range(num)]
    for name, site in _sample_sites(drawn):
        if name in single.nodes:
            for i, trace in enumerate(traces):
                value, alone = site["value"], single.nodes[name]
                if not site_is_subsample(site):
                    value = value[i].reshape(alone["value"].shape)  # type: ignore[union-attr]
                trace.add_node(name, **{**site, "value": value})
    return traces


def _at(program: Program, values: Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    replayed = poutine.replay(program, trace=values)
    return poutine.trace(replayed).get_trace(*args, **kwargs)


@contextmanager
def _evaluation_mode(program: Program) -> Iterator[None]:
    modules = list(program.modules()) if isinstance(program, torch.nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


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


@torch.no_grad()
def plate_nesting(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int:
    """How many plate dimensions model and guide use: `max_plate_nesting` of Pyro's ELBOs."""
    return _nesting(*_traces(model, guide, args, kwargs))


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


def _cat(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
