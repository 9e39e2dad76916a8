"""A model's log joint as a function on ℝᴰ, of many particles at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ._latents import Latent, read_latent, unpack

Program = Callable[..., Any]

# The plate of particles that run at once, under the name that Pyro's own bounds give theirs.
PARTICLES = "num_particles_vectorized"


class JointDensity:
    """u `(*, D)` -> log p(x, T(u)) + log|det T'(u)| `(*)`, in nats, with T from ℝᴰ to the supports of the latents.

    `sites`: latent name -> its site in a trace of the model, in the order in which they are laid out in u.
    `vectorized=False` runs the model once a row. -inf where the model gives NaN. May be called within plates, whose
    dimensions u then has. Under a plate in `subsampled` every call draws its own part of the data; what else the model
    draws beside the latents is in `noise`. Both are names of sites.
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
            trace = self._trace(model, {latent.name: latent.inside for latent in self._latents})
        self._nesting = _nesting(trace)
        drawn = [(name, s) for name, s in _sample_sites(trace) if not s["is_observed"]]
        self.subsampled = [
            name
            for name, site in drawn
            if site_is_subsample(site) and len(site["value"]) < site["fn"].size
        ]
        self.noise = [name for name, site in drawn if not site_is_subsample(site)]
        # The leaves behind the parameters that the last run of the model read.
        self.parameters: list[Tensor] = []

    @property
    def is_stochastic(self) -> bool:
        """Whether every call draws its own part of the data."""
        return bool(self.subsampled)

    @property
    def dim(self) -> int:
        """D."""
        return sum(latent.unconstrained_shape.numel() for latent in self._latents)

    def __call__(self, u: Tensor) -> Tensor:
        # Plates around this call have as many dimensions, and those of the model's particles go to the left of them.
        outside = u.dim() - 1
        rows = u.reshape(-1, u.shape[-1])
        with poutine.block(), pyro.validation_enabled(False), nonfinite_ignored():
            if self.vectorized:
                value = self._evaluate(rows, max(self._nesting, outside))
            else:
                value = torch.cat([self._evaluate(row, None) for row in rows.split(1)])
        return value.reshape(u.shape[:-1])

    def _evaluate(self, u: Tensor, nesting: int | None) -> Tensor:
        """The log-density `(N)` of u `(N, D)` in one run of the model; of one row, without a plate, where None."""
        values, ladj = self.constrain(u)
        num, model = len(u), self.model
        if nesting is not None:
            model = in_particles(model, num, nesting, name="particles_of_log_density")
            values = {x.name: _beside_plates(x, values[x.name], nesting) for x in self._latents}
        else:
            values = {name: value[0] for name, value in values.items()}
        trace = self._trace(model, values)
        log_joint = log_prob_by_particle(trace, num) + ladj
        self.parameters = [_leaf(s) for s in trace.nodes.values() if s["type"] == "param"]
        return nan_to_zero_density(log_joint)

    def _trace(self, model: Program, values: dict[str, Tensor]) -> Trace:
        conditioned = poutine.condition(model, values)
        return poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents T(u) of u `(N, D)`, site -> `(N, *shape)`, and log|det T'(u)| `(N)`."""
        values, ladjs = {}, []
        for latent, value, ladj in unpack(u, self._latents):
            values[latent.name] = value
            ladjs.append(sum_rightmost(ladj, ladj.dim() - 1))
        return values, torch.stack(ladjs).sum(0)


def _beside_plates(latent: Latent, value: Tensor, nesting: int) -> Tensor:
    """A batch of values with its first dimension left of all plates."""
    gap = nesting - (len(latent.shape) - latent.event_dim)
    return value.reshape(value.shape[0], *[1] * gap, *value.shape[1:])


def _leaf(site: Any) -> Tensor:
    """What is trained, of a parameter under a constraint."""
    unconstrained = getattr(site["value"], "unconstrained", None)
    leaf = None if unconstrained is None else unconstrained()
    return site["value"] if leaf is None else leaf


# --- traces of many particles ---


def in_particles(program: Program, num: int, nesting: int, name: str = PARTICLES) -> Program:
    """The program in a plate of `num` particles, left of its own `nesting` dimensions of plates."""
    return pyro.plate(name, num, dim=-nesting - 1)(program)  # type: ignore[no-any-return]


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


def log_prob_by_particle(trace: Trace, num: int) -> Tensor:
    """The log-density of a trace, scales and masks applied, of each of `num` particles: `(num)`."""
    trace.compute_log_prob()
    terms = [s["log_prob"] for _, s in _sample_sites(trace) if not site_is_subsample(s)]
    return torch.stack(
        [t.reshape(num, -1).sum(-1) if t.dim() else t.expand(num) for t in terms]
    ).sum(0)


# --- values that are not finite ---


def nan_to_zero_density(log_density: Tensor) -> Tensor:
    """-inf in place of NaN."""
    return torch.where(log_density.isnan(), -torch.inf, log_density)


@contextmanager
def nonfinite_ignored() -> Iterator[None]:
    """Without Pyro's warnings of log-densities that are not finite: for callers who look at the values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        yield
