"""Traces of Pyro programs: sites, plates, and batches of particles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Program = Callable[..., Any]
Site = Any  # a node of a trace

# The plate of vectorised particles, under the name that Pyro's own bounds use.
PARTICLES = "num_particles_vectorized"


@contextmanager
def recorded_parameters() -> Iterator[dict[str, Tensor]]:
    """The unconstrained parameters, by name, that programs within read: filled in at the end."""
    params: dict[str, Tensor] = {}
    with poutine.trace(param_only=True) as capture:
        yield params
    sites: Any = capture.trace.nodes.items()
    params |= {n: site["value"].unconstrained() for n, site in sites if site["type"] == "param"}


def sample_sites(trace: Trace) -> list[tuple[str, Site]]:
    """The sample sites of a trace by name, observed ones included."""
    return [(name, site) for name, site in trace.nodes.items() if site["type"] == "sample"]


def is_latent(site: Site) -> bool:
    """Whether a sample site is unobserved and not the subsample of a plate."""
    return not site["is_observed"] and not site_is_subsample(site)


def latent_sites(trace: Trace) -> list[tuple[str, Site]]:
    """The latent sites of a trace by name, auxiliary ones left out."""
    return [
        (name, site)
        for name, site in sample_sites(trace)
        if is_latent(site) and not site["infer"].get("is_auxiliary")
    ]


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a `Delta`, also within masks and event dimensions."""
    while isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def nesting_of(*traces: Trace) -> int:
    """The number of plate dimensions in these traces: `max_plate_nesting` of Pyro's ELBOs."""
    dims = [
        frame.dim
        for trace in traces
        for _, site in sample_sites(trace)
        for frame in site["cond_indep_stack"]
        if frame.vectorized
    ]
    return -min(dims) if dims else 0


def in_particles(program: Program, num: int, nesting: int, name: str = PARTICLES) -> Program:
    """The program in a plate of `num` particles, to the left of its own `nesting` plate dimensions."""
    return pyro.plate(name, num, dim=-nesting - 1)(program)


def log_prob_by_particle(trace: Trace, num: int) -> Tensor:
    """The log-density of a trace, scaled and masked, for each of `num` particles: `(num)`."""
    trace.compute_log_prob()
    terms = [s["log_prob"] for _, s in sample_sites(trace) if not site_is_subsample(s)]
    if not terms:
        return torch.zeros(num)
    return torch.stack(
        [t.reshape(num, -1).sum(-1) if t.dim() else t.expand(num) for t in terms]
    ).sum(0)


@contextmanager
def nonfinite_ignored() -> Iterator[None]:
    """Silences Pyro's warnings of log-densities that are not finite, for callers that handle them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        yield


@contextmanager
def evaluation_mode(program: Program) -> Iterator[None]:
    """Sets a program that is a module to evaluation mode, and restores its modes."""
    modules = list(program.modules()) if isinstance(program, torch.nn.Module) else []
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
