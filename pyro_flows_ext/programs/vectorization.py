"""Whether model and guide give the same in a batch of particles as one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .match import traces_of
from .raising import ERRORS
from .traces import (
    Program,
    evaluation_mode,
    in_particles,
    is_delta,
    latent_sites,
    log_prob_by_particle,
    nesting_of,
    sample_sites,
)

ADVICE = "declare every independent dimension with pyro.plate and index from the right"


@torch.no_grad()
def vectorization_error(
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
    with evaluation_mode(guide), poutine.block():
        single = traces_of(model, guide, args, kwargs)
        nesting = nesting_of(*single)
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
            return _difference(model, model_trace, guide_trace, alone, args, kwargs)
        except ERRORS as error:
            return f"with a batch of particles the {who} raises {type(error).__name__}: {error}"


def _difference(
    model: Program,
    model_trace: Trace,
    guide_trace: Trace,
    alone: list[Trace],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    """The difference between particles in a batch and single runs at the same values of the guide."""
    num = len(alone)
    of_model, of_guide = (log_prob_by_particle(t, num) for t in (model_trace, guide_trace))
    subsample = {
        name: site["value"] for name, site in sample_sites(model_trace) if site_is_subsample(site)
    }
    for i, single in enumerate(alone):
        values = {}
        for name, site in latent_sites(single):
            batched: Any = guide_trace.nodes[name]["value"]
            values[name] = batched[i].reshape(site["value"].shape)
            if not _close(values[name], site["value"], 1e-3):
                return f"the guide draws another {name!r} for a particle alone than in a batch of the same; {ADVICE}"
        conditioned = poutine.condition(model, data={**values, **subsample})
        model_alone = poutine.trace(conditioned).get_trace(*args, **kwargs)
        # Inverses of flows cost the guide some digits.
        for what, of_batch, of_one, rtol, atol in (
            ("log joint", of_model[i], model_alone.log_prob_sum(), 1e-4, 1e-3),
            ("guide's log density", of_guide[i], single.log_prob_sum(), 1e-3, 1e-2),
        ):
            one = torch.as_tensor(of_one).to(of_batch)
            if not torch.allclose(of_batch, one, rtol=rtol, atol=atol, equal_nan=True):
                numbers = f"{one.item():.6g} alone and {of_batch.item():.6g} in a batch"
                return f"the {what} of a particle is {numbers}; {ADVICE}"
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
    for name, site in sample_sites(guide_trace):
        if not site["is_observed"] and not is_delta(site["fn"]):
            drawn.add_node(name, **{**site, "value": site["value"].clone()})
    return drawn


def _split(drawn: Trace, single: Trace, num: int) -> list[Trace]:
    """The draws of each particle alone, in the shapes of a run without particles."""
    traces = [Trace() for _ in range(num)]
    for name, site in sample_sites(drawn):
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


@torch.no_grad()
def plate_nesting(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int:
    """How many plate dimensions model and guide use: `max_plate_nesting` of Pyro's ELBOs."""
    return nesting_of(*traces_of(model, guide, args, kwargs))
