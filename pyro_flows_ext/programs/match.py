"""Checks of a model against its guide, on single traces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch.nn import Parameter

from ..distributions import check_guide_site
from .latents import read_latent
from .traces import Program, Site, is_delta, is_latent, latent_sites, nesting_of, sample_sites

# Between the name of a module and that of its parameter.
MODULE_DIVIDER = "$$$"


@torch.no_grad()
def traces_of(
    model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Trace, Trace]:
    """One trace of the model, replayed at one trace of the guide."""
    with poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    return model_trace, guide_trace


def check_marginalised(name: str, site: Site) -> None:
    """Raises `ValueError` for a latent outside of the guide that is not enumerated."""
    if site["infer"].get("enumerate") and site["fn"].has_enumerate_support:
        return
    fn = type(site["fn"]).__name__
    if site["fn"].has_enumerate_support:
        raise ValueError(
            f"latent {name!r} of the model ({fn}) is not in the guide: expected a draw of the guide for every latent, or "
            "enumeration; decorate the model with pyro.infer.config_enumerate to sum it out exactly"
        )
    raise ValueError(
        f"latent {name!r} of the model ({fn}) is not in the guide: expected a draw of the guide for every latent. If "
        f"{name!r} is data, pass the same data as to the guide; if not, add it to the guide or condition the model on it"
    )


def check_latents(model_trace: Trace, guide_trace: Trace) -> None:
    """Raises `ValueError` unless the guide draws exactly the latents of the model that are not enumerated.

    A density that is a bound cannot be a site of the guide.
    """
    for name, site in sample_sites(model_trace):
        if is_latent(site) and name not in guide_trace.nodes:
            check_marginalised(name, site)
    for name, site in sample_sites(guide_trace):
        in_model = model_trace.nodes.get(name)
        if not is_latent(site):
            continue
        check_guide_site(name, site["fn"])
        if site["infer"].get("is_auxiliary"):
            continue
        if in_model is None:
            raise ValueError(
                f"latent {name!r} of the guide is not in the model, and would count in the guide's density alone: take it "
                "out of the guide; or, if the model has a factor for it, mark it infer={'is_auxiliary': True}"
            )
        if in_model["is_observed"]:
            raise ValueError(
                f"site {name!r} is drawn by the guide and observed by the model: expected one of both; hide it from the "
                f"guide by poutine.block(model, hide=[{name!r}]), or take the data away"
            )


def check_modules(*traces: Trace) -> None:
    """Raises `ValueError` where `pyro.module` got a module whose parameters are not those of the store, which are trained."""
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] != "param" or MODULE_DIVIDER not in name or len(site["args"]) < 2:
                continue
            own: Any = site["args"][1]
            stored: Any = site["value"]
            if isinstance(own, Parameter) and own.data_ptr() != stored.unconstrained().data_ptr():
                raise ValueError(
                    f"pyro.module: expected the parameter {name!r} of the module itself, got another one from the parameter "
                    "store, which would be trained in its place while the module stays as it is. Call "
                    "pyro.clear_param_store() before a new module of this name is used; pass update_module_params=True to "
                    "take over what the store holds; and make a parameter that is not contiguous .contiguous()"
                )


def check_shapes(model_trace: Trace, guide_trace: Trace) -> None:
    """Pyro's checks of the shapes of single traces, as `SVI` makes them: raises `ValueError` for a missing plate."""
    if not is_validation_enabled():
        return
    pruned = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
    # Without enumeration no batch dimension may lie left of the plates.
    nesting: float = math.inf
    if any(name not in guide_trace.nodes for name, _ in latent_sites(model_trace)):
        nesting = nesting_of(model_trace, guide_trace)
    else:
        check_model_guide_match(*pruned, nesting)
    for trace in pruned:
        trace.compute_log_prob()
        for _, site in sample_sites(trace):
            check_site_shape(site, nesting)  # type: ignore[arg-type]  # Pyro passes infinity too


def check_density(model_trace: Trace, guide_trace: Trace, other: Trace) -> None:
    """Raises `ValueError` for a guide with latents at points, which have no density.

    A `Delta` has a density where it is the image of an auxiliary draw, as in Pyro's guides over unconstrained space. A
    latent whose `Delta` is the same in two traces of the guide is a point; so are the latents of a guide that draws
    fewer numbers than its `Delta` sites take.
    """
    drawn, deltas = 0, {}
    for name, site in sample_sites(guide_trace):
        if not is_latent(site):
            continue
        if site["infer"].get("is_auxiliary"):
            drawn += 0 if is_delta(site["fn"]) else site["value"].numel()
        elif is_delta(site["fn"]) and name in model_trace.nodes:
            deltas[name] = site
    again: dict[str, Site] = dict(other.nodes)
    points = [n for n, s in deltas.items() if torch.equal(s["value"], again[n]["value"])]
    if not points and drawn < sum(_dimension(model_trace.nodes[n]) for n in deltas):
        points = list(deltas)
    if points:
        raise ValueError(
            f"guide: latents {points} are points (Delta), which have no density: importance weights and evidence do not "
            "exist. Use a guide with a density, or condition the model on these values"
        )


def _dimension(site: Site) -> int:
    """The dimension of a latent's unconstrained space."""
    return read_latent(site["name"], site).unconstrained_shape.numel()


def subsampled_plates(trace: Trace) -> dict[str, tuple[int, int]]:
    """The subsampled plates of a trace: name -> (size of the subsample, full size)."""
    return {
        name: (len(site["value"]), site["fn"].size)
        for name, site in sample_sites(trace)
        if site_is_subsample(site) and len(site["value"]) < site["fn"].size
    }
