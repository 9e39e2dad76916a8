"""A model's log joint by datum, as a function of unconstrained latents, for annealing and local fits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from ..programs import (
    PARTICLES,
    Program,
    in_particles,
    nesting_of,
    nonfinite_ignored,
    sample_sites,
    value_and_gradient,
    vectorization_error,
)

Site = Any  # of a trace


class LocalDensity:
    """u `(S, *data, D)` -> log p(x_n, T(u_n)) + log|det T'(u_n)| `(S, *data)`, in nats, by datum n for S particles.

    T maps ℝᴰ to the supports of the latents. -inf where the model gives NaN. Sites outside of the plates depend on no
    latent and are left out, as is the scale of a subsampled plate, of which one subsample is drawn and kept.

    Args:
        model: a Pyro model.
        args, kwargs: its arguments.
        plates: names of the plates of data: `data` is `(N)`, N the product of their sizes, and D counts the latents of
            a datum. With `()` all latents are one datum: `data` is `()`.
        nesting: least number of plate dimensions, for a guide that uses more of them than the model.

    Raises:
        ValueError: for a discrete latent, a latent outside of the plates, and plates that are loops.
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        plates: Collection[str] = (),
        nesting: int = 0,
    ):
        self.args, self.kwargs, self.plates = args, dict(kwargs or {}), frozenset(plates)
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(model).get_trace(*args, **self.kwargs)
        self.nesting = max(nesting_of(trace), nesting)
        sites = sample_sites(trace)
        self.subsamples = {name: s["value"] for name, s in sites if site_is_subsample(s)}
        self.full_sizes = {name: s["fn"].size for name, s in sites if site_is_subsample(s)}
        self.model = self.on_these_data(model)
        self.sites = {
            name: site
            for name, site in sites
            if not site["is_observed"] and not site_is_subsample(site)
        }
        self._check_latents()
        frames = _frames(next(iter(self.sites.values())))
        self._data = {frames[name].dim: frames[name].size for name in sorted(self.plates)}
        self._data = dict(sorted(self._data.items()))  # from left to right

    def _check_latents(self) -> None:
        if not self.sites:
            raise ValueError("model: expected at least one latent, got none")
        for name, site in self.sites.items():
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"latent {name!r} is discrete ({type(site['fn']).__name__}): expected continuous latents; sum it out "
                    "inside the model"
                )
            frames = _frames(site)
            for plate in self.plates:
                if plate not in frames:
                    raise ValueError(
                        f"latent {name!r} lies outside of plate {plate!r}: expected every latent to be local to the data; "
                        "fix the others by poutine.condition(model, data={...})"
                    )
                if frames[plate].dim is None:
                    raise ValueError(
                        f"plate {plate!r} is a loop: expected a vectorised one, `with pyro.plate(...)`"
                    )

    def on_these_data(self, program: Program) -> Program:
        """The program with the subsample of this density, where a plate draws one."""
        return poutine.condition(program, data=self.subsamples) if self.subsamples else program

    @property
    def data_shape(self) -> torch.Size:
        """`(N)`, or `()` without plates."""
        return torch.Size([math.prod(self._data.values())] if self._data else [])

    @property
    def dim(self) -> int:
        """D."""
        num_data = math.prod(self.data_shape)
        return sum(self._shape(site).numel() for site in self.sites.values()) // num_data

    # --- densities ---

    def __call__(self, u: Tensor) -> Tensor:
        return self.prior_and_joint(u)[1]

    def prior_and_joint(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x, u), by datum, from one run of the model: each `(S, *data)`."""
        values, ladj = self.constrain(u)
        trace = self._run(poutine.condition(self.model, data=values), len(u))
        latent = [s for n, s in sample_sites(trace) if n in self.sites]
        rest = [s for n, s in sample_sites(trace) if n not in self.sites]
        prior = self.by_datum(latent, len(u)) + ladj
        joint = prior + self.by_datum(rest, len(u))
        return prior.nan_to_num(-torch.inf, torch.inf, -torch.inf), joint.nan_to_num(
            -torch.inf, torch.inf, -torch.inf
        )

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x, u) `(S, *data)` and its gradient `(S, *data, D)`; where one is not finite, -inf and 0."""
        return value_and_gradient(self, u)

    @torch.no_grad()
    def draw_prior(self, num: int) -> Tensor:
        """Draws of the latents as the model makes them: `(num, *data, D)`."""
        trace = self._run(self.model, num)
        return self.unconstrain(self._values(trace), num)[0]

    @torch.no_grad()
    def draw_guide(self, guide: Program, num: int) -> tuple[Tensor, Tensor]:
        """Draws u `(num, *data, D)` of a guide, and their log q(u) by datum `(num, *data)`.

        With auxiliary guide sites log q is that of the extended space.
        """
        trace = self._run(self.on_these_data(guide), num)
        u, ladj = self.unconstrain(self._values(trace), num)
        return u, self.by_datum([site for _, site in sample_sites(trace)], num) + ladj

    def log_guide(self, guide: Program, u: Tensor) -> Tensor:
        """log q(u) by datum, of a guide without auxiliary sites, at any u: `(S, *data, D)` -> `(S, *data)`."""
        values, ladj = self.constrain(u)
        trace = self._run(poutine.condition(self.on_these_data(guide), data=values), len(u))
        log_q = self.by_datum([site for _, site in sample_sites(trace)], len(u)) + ladj
        return log_q.nan_to_num(-torch.inf, torch.inf, -torch.inf)

    def _run(self, program: Program, num: int) -> Trace:
        program = in_particles(program, num, self.nesting)
        with poutine.block(), pyro.validation_enabled(False), nonfinite_ignored():
            trace = poutine.trace(program).get_trace(*self.args, **self.kwargs)
            trace.compute_log_prob()
        return trace

    def _values(self, trace: Trace) -> dict[str, Tensor]:
        nodes: dict[str, Any] = dict(trace.nodes)
        return {name: nodes[name]["value"] for name in self.sites}

    def by_datum(self, sites: Iterable[Site], num: int) -> Tensor:
        """The sum of the log-densities of those `sites` that lie within the plates: `(num, *data)`."""
        total: Tensor | float = 0.0
        for site in sites:
            if self.plates <= _frames(site).keys() and not _has_no_density(site):
                total = total + self._by_datum(site)
        sizes = [num, *self._data.values()]
        return torch.as_tensor(total).expand(sizes).reshape(num, *self.data_shape)

    def _by_datum(self, site: Site) -> Tensor:
        """A site's log-density, `(num or 1, *sizes of the plates)`."""
        frames = _frames(site)
        # The scale of the data plates is that of their subsample; any other one belongs to the density.
        scale = site["scale"]
        for frame in (frames[name] for name in self.plates):
            scale = scale * frame.size / (frame.full_size or frame.size)
        value = scale_and_mask(site["unscaled_log_prob"], scale, site["mask"])
        if value.dim() > self.nesting + 1:
            raise ValueError(
                f"site {site['name']!r} has batch shape {tuple(value.shape)}, more dimensions than there are plates; "
                "declare every batch dimension by pyro.plate, or make it an event dimension by .to_event"
            )
        value = value.reshape((1,) * (self.nesting + 1 - value.dim()) + value.shape)
        others = [dim for dim in range(-self.nesting, 0) if dim not in self._data]
        return value.sum(others) if others else value

    # --- layout: where in u a latent lies ---

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents T(u), site -> `(S, *plates, *event)`, and log|det T'(u)| by datum `(S, *data)`."""
        values, ladjs, start = {}, [], 0
        num, num_data = len(u), math.prod(self.data_shape)
        for name, site in self.sites.items():
            T, shape, order = biject_to(site["fn"].support), self._shape(site), self._order(site)
            size = shape.numel() // num_data
            part = u[..., start : start + size]
            start += size
            sorted_shape = [shape[d] for d in order]
            back = [0, *(1 + order.index(d) for d in range(len(order)))]
            part = part.reshape(num, *sorted_shape).permute(back)
            values[name] = T(part)
            ladjs.append(self._ladj(T, part, values[name], site))
        return values, torch.stack(ladjs).sum(0)

    def unconstrain(self, values: Mapping[str, Tensor], num: int) -> tuple[Tensor, Tensor]:
        """u `(num, *data, D)` of latents `(num or 1, *plates, *event)`, and log|det T'(u)| by datum."""
        parts, ladjs = [], []
        for name, site in self.sites.items():
            T, order = biject_to(site["fn"].support), self._order(site)
            padded = self._padded(site) + site["fn"].event_shape
            value = values[name]
            value = value.reshape((1,) * (1 + len(padded) - value.dim()) + value.shape)
            value = value.expand(num, *padded)
            part = T.inv(value)
            ladjs.append(self._ladj(T, part, value, site))
            part = part.permute([0, *(1 + d for d in order)])
            parts.append(part.reshape(num, *self.data_shape, -1))
        return torch.cat(parts, -1), torch.stack(ladjs).sum(0)

    def _padded(self, site: Site) -> torch.Size:
        """The batch shape of a site with all plate dimensions that there are."""
        batch = site["fn"].batch_shape
        return torch.Size((1,) * (self.nesting - len(batch)) + tuple(batch))

    def _shape(self, site: Site) -> torch.Size:
        padded = self._padded(site) + site["fn"].event_shape
        return biject_to(site["fn"].support).inverse_shape(padded)

    def _order(self, site: Site) -> list[int]:
        """The dimensions of the unconstrained site, those of the data first."""
        data = [self.nesting + dim for dim in self._data]
        return [*data, *(d for d in range(len(self._shape(site))) if d not in data)]

    def _ladj(self, T: Any, u: Tensor, value: Tensor, site: Site) -> Tensor:
        ladj = T.log_abs_det_jacobian(u, value)
        ladj = sum_rightmost(ladj, ladj.dim() - 1 - self.nesting)
        others = [dim for dim in range(-self.nesting, 0) if dim not in self._data]
        ladj = ladj.sum(others) if others else ladj
        return ladj.reshape(len(u), *self.data_shape)


def local_density(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> LocalDensity:
    """The density by datum of a model whose latents are all local to a plate, checked against the guide.

    The data are those of the plates that all latents of the model have in common.
    Raises `ValueError` when there is no such plate, when guide and model differ in their latents or either does not
    vectorise, when a density outside of the plate depends on a latent, or a part of log q lies outside.
    """
    with torch.no_grad(), poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    latents = {
        name: site
        for name, site in sample_sites(model_trace)
        if not site["is_observed"] and not site_is_subsample(site)
    }
    missing = sorted(latents.keys() - guide_trace.nodes.keys())
    if missing or not latents:
        raise ValueError(
            f"guide: expected a draw of every latent of the model, got none of {missing}"
        )
    plates = frozenset.intersection(*(frozenset(_frames(s)) for s in latents.values()))
    if not plates:
        raise ValueError(
            f"model: expected latents local to one data plate, got none that holds all of {sorted(latents)}; fix global "
            "latents by poutine.condition(model, data={...})"
        )
    density = LocalDensity(
        model, args, kwargs, plates=plates, nesting=nesting_of(model_trace, guide_trace)
    )
    reason = vectorization_error(model, guide, args, kwargs)
    if reason is not None:
        raise ValueError(f"model: expected one that runs many particles at once: {reason}")
    _check_outside(density, guide)
    return density


@torch.no_grad()
def _check_outside(density: LocalDensity, guide: Program) -> None:
    trace = density._run(density.on_these_data(guide), 3)
    for name, site in sample_sites(trace):
        if not density.plates <= _frames(site).keys() and not _has_no_density(site):
            raise ValueError(
                f"site {name!r} of the guide lies outside of the plates {sorted(density.plates)} of the latents: "
                "expected log q by datum"
            )
    trace = density._run(poutine.condition(density.model, data=density._values(trace)), 3)
    for name, site in sample_sites(trace):
        if density.plates <= _frames(site).keys() or _has_no_density(site):
            continue
        by_particle = site["log_prob"].expand(3, *site["log_prob"].shape[1:]).reshape(3, -1)
        if not torch.allclose(by_particle, by_particle[:1], rtol=1e-5, equal_nan=True):
            raise ValueError(
                f"site {name!r} lies outside of the plates {sorted(density.plates)} of the latents, and depends on them: "
                "there is no log joint by datum"
            )


def _frames(site: Site) -> dict[str, Any]:
    frames = site["cond_indep_stack"]
    return {f.name: f for f in frames if f.name != PARTICLES}


def _has_no_density(site: Site) -> bool:
    return site_is_subsample(site) or bool(site["infer"].get("_deterministic"))
