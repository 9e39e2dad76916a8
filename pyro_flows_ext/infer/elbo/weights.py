"""Importance weights of a model and a guide: by datum where every latent is local to a plate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...distributions import check_guide_site
from ...ops import broadcast_shapes
from ...programs import PARTICLES, is_delta

Plate = tuple[str, int | None]  # name and dimension; None for a plate that is a loop
Scale = float | Tensor

# The key under which a site carries a factor that belongs inside the weights: see `annealing`.
TEMPERATURE = "_inverse_temperature"


@dataclass(frozen=True)
class Weights:
    """log w_bk by datum, in groups (one group, or one a turn of a sequential plate), and what lies outside.

    Of each group: `log_w` and, without log q of the draws that were cut, `rest`: `(B, K, *data)` for B bounds of K
    particles; `scale`: broadcasts to `(*data)`.
    """

    log_w: list[Tensor]
    rest: list[Tensor]
    scale: list[Scale]
    outside: Tensor

    @property
    def bound(self) -> Tensor:
        """Σ_n s_n log 1/K Σ_k w_nk, its mean over the bounds, and what lies outside."""
        bound = self.outside
        for log_w, scale in zip(self.log_w, self.scale, strict=True):
            values = log_w.logsumexp(1) - math.log(log_w.shape[1])
            bound = bound + (scale * values.mean(0)).sum()
        return bound

    def through_draws(self, power: int) -> Tensor:
        """Σ_n s_n Σ_k w̃_nk^power log w_nk with w̃ = w / Σ w held fixed: for the gradient in the draws."""
        return self._weighted(self.log_w, power)

    def around_draws(self) -> Tensor:
        """Σ_n s_n Σ_k w̃_nk log w_nk with w̃ held fixed, log q of the draws left out, and what lies outside."""
        return self._weighted(self.rest, 1) + self.outside

    def _weighted(self, values: list[Tensor], power: int) -> Tensor:
        total = torch.zeros_like(self.outside)
        for log_w, value, scale in zip(self.log_w, values, self.scale, strict=True):
            weight = log_w.detach().softmax(1) ** power
            total = total + (scale * (weight * value).sum(1).mean(0)).sum()
        return total


@dataclass(frozen=True)
class _Term:
    """The log-density of a site, + in the model and - in the guide: `value` `(K or 1, *plates)`, masked, not scaled."""

    site: dict[str, Any]
    sign: int
    value: Tensor
    plates: frozenset[Plate]
    is_random: bool
    is_cut: bool

    @property
    def scale(self) -> Scale:
        return self.site["scale"]

    def turns(self, plates: Collection[Plate]) -> tuple[int, ...]:
        """Which turn of those of `plates` that are loops this is."""
        stack = self.site["cond_indep_stack"]
        return tuple(f.counter for f in stack if f.dim is None and (f.name, None) in plates)

    def by_datum(self, plates: Collection[Plate]) -> Tensor:
        """The sum over all dimensions but the first and those of `plates`."""
        keep = {dim for _, dim in plates}
        dims = [d for d in range(1 - self.value.dim(), 0) if d not in keep]
        return self.value.sum(dims, keepdim=True) if dims else self.value


def check_reparameterized(model_trace: Trace, guide_trace: Trace) -> None:
    """Raises `ValueError` for a latent without reparameterised draws or with a bound for log q, or one that the guide leaves out."""
    for site in _sites(guide_trace):
        fn, name = site["fn"], site["name"]
        check_guide_site(name, fn)
        if isinstance(fn, dist.Unit):
            if not fn.has_rsample:
                raise ValueError(
                    f"factor {name!r} of the guide: expected pyro.factor(..., has_rsample=True), for a log-density that "
                    "is differentiable in the parameters through the draws"
                )
        elif not site["is_observed"] and (site["infer"].get("enumerate") or not fn.has_rsample):
            raise ValueError(
                f"latent {name!r} ({type(fn).__name__} in the guide) is discrete, enumerated or not reparameterised: "
                "expected draws that are differentiable in the parameters. Sum out a discrete latent by TraceEnum_ELBO, "
                "or by hand inside the model"
            )
    for site in _sites(model_trace):
        name = site["name"]
        if not site["is_observed"] and name not in guide_trace.nodes:
            kind = "enumerated " if site["infer"].get("enumerate") else ""
            raise ValueError(
                f"{kind}latent {name!r} of the model is not in the guide: expected one draw of the guide for each; "
                "sum out a discrete latent by TraceEnum_ELBO, or by hand inside the model"
            )


def importance_weights(
    traces: Sequence[tuple[Trace, Trace]],
    cut: Collection[str],
    num_bounds: int,
    num_particles: int,
    nesting: int | None,
) -> Weights:
    """The weights of B = `num_bounds` times K = `num_particles` draws: a pair of traces (model, guide) for each, or one for all.

    `nesting`: with all particles in one pair, the number of plate dimensions, theirs included. `cut`: the draws of the
    guide whose log q `rest` leaves out. Raises `ValueError` for more than one particle where scales differ inside a
    logarithm.
    """
    dims = nesting
    if dims is None:
        dims = 1 + max(s["log_prob"].dim() for pair in traces for t in pair for s in _sites(t))
    runs = [
        [
            _term(site, -1 if trace is pair[1] else 1, cut, dims)
            for trace in pair
            for site in _sites(trace)
        ]
        for pair in traces
    ]
    if num_particles == 1:  # no mean inside a logarithm, so scales may be anywhere
        zero = runs[0][0].value.new_zeros(())
        every = [t for run in runs for t in run]
        rest = sum((_mean(t) for t in every if not t.is_cut), start=zero) / len(runs)
        log_w = sum((_mean(t) for t in every if t.is_cut), start=zero) / len(runs) + rest
        return Weights([log_w.reshape(1, 1)], [rest.reshape(1, 1)], [1.0], zero)
    return _grouped(runs, _data_plates(runs), num_bounds, num_particles)


def _sites(trace: Trace) -> list[dict[str, Any]]:
    nodes: list[Any] = list(trace.nodes.values())
    return [
        site
        for site in nodes
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    ]


def _term(site: dict[str, Any], sign: int, cut: Collection[str], dims: int) -> _Term:
    value = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
    value = sign * site.get(TEMPERATURE, 1.0) * value
    if value.dim() > dims:
        raise ValueError(
            f"site {site['name']!r} has batch shape {tuple(value.shape)}, more dimensions than there are plates; "
            "declare every batch dimension by pyro.plate, or make it an event dimension by .to_event"
        )
    frames = [f for f in site["cond_indep_stack"] if f.name != PARTICLES]
    is_latent = sign < 0 and not site["is_observed"]
    return _Term(
        site=site,
        sign=sign,
        value=value.reshape((1,) * (dims - value.dim()) + value.shape),
        plates=frozenset((f.name, f.dim) for f in frames),
        is_random=is_latent and not is_delta(site["fn"]),
        is_cut=is_latent and site["name"] in cut,
    )


def _data_plates(runs: list[list[_Term]]) -> frozenset[Plate] | None:
    """The plates that all that is random lies in; None where nothing is random.

    Those of the random latents, in model and guide, at first. What lies outside and differs between the particles
    depends on latents all the same, and takes those plates away that it is not in.
    """
    random = {t.site["name"] for run in runs for t in run if t.is_random}
    if not random:
        return None
    plates = frozenset.intersection(
        *(t.plates for run in runs for t in run if t.site["name"] in random)
    )
    sites = defaultdict(list)
    for run in runs:
        for term in run:
            sites[term.site["name"], term.sign].append(term)
    last = None
    while plates and plates != last:
        last = plates
        for terms in sites.values():
            if not plates <= terms[0].plates and (
                len(terms) < len(runs) or _differ_by_particle(terms)
            ):
                plates &= terms[0].plates
    return plates


def _differ_by_particle(terms: list[_Term]) -> bool:
    """Whether a site's log-density, or the draw where it is a `Delta`, depends on the particle."""
    values = [torch.cat([t.value for t in terms])]
    site = terms[0].site
    if is_delta(site["fn"]) and not site["is_observed"]:
        draws = [t.site["value"] for t in terms]
        if len(draws) > 1:
            values.append(torch.stack(draws))
        elif draws[0].dim() == terms[0].value.dim() + site["fn"].event_dim:
            values.append(draws[0])  # the particles' dimension is in front
    # The answer is the same at any values, so that a traced program may read these; the modes are those of tracing.
    with _without_modes():
        return any(bool((v - v[:1]).abs().amax() > 64 * _eps(v) * v.abs().amax()) for v in values)


def _without_modes() -> Any:
    try:  # private, so imported here: a rename must not break the import of this package
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return nullcontext()
    return _disable_current_modes()


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps


def _mean(term: _Term) -> Tensor:
    """A term with its scale, its mean over the draws."""
    return (term.scale * term.value).sum() / len(term.value)


def _grouped(
    runs: list[list[_Term]],
    plates: frozenset[Plate] | None,
    num_bounds: int,
    num_particles: int,
) -> Weights:
    """Terms within `plates` added up by datum, all others in one sum, with its mean over particles."""
    outside = runs[0][0].value.new_zeros(())
    inside: dict[tuple[int, ...], list[list[_Term]]] = defaultdict(lambda: [[] for _ in runs])
    for i, run in enumerate(runs):
        for term in run:
            if plates is not None and plates <= term.plates:
                inside[term.turns(plates)][i].append(term)
            else:
                outside = outside + _mean(term) / len(runs)
    weights = Weights([], [], [], outside)
    for group in inside.values():
        scale = _common_scale([t for terms in group for t in terms])
        shape = (num_bounds, num_particles)
        log_w = _stack(group, plates or (), shape)
        rest = log_w
        if any(t.is_cut for terms in group for t in terms):
            kept = [[t for t in terms if not t.is_cut] for terms in group]
            rest = _stack(kept, plates or (), shape)
        if isinstance(scale, Tensor) and (
            broadcast_shapes(scale.shape, log_w.shape[2:]) != log_w.shape[2:]
        ):
            raise ValueError(
                f"scale of shape {tuple(scale.shape)} differs within a datum: the data with weights of their own have "
                f"shape {tuple(log_w.shape[2:])}. Use num_particles=1, or one scale a datum"
            )
        weights.log_w.append(log_w)
        weights.rest.append(rest)
        weights.scale.append(scale)
    return weights


def _stack(group: list[list[_Term]], plates: Collection[Plate], shape: tuple[int, int]) -> Tensor:
    """The sum of the terms of each run, by datum, with bounds and particles in front: `(B, K, *data)`."""
    some = next(t.value for terms in group for t in terms)
    zero = some.new_zeros((1,) * some.dim())
    sums = [sum((t.by_datum(plates) for t in terms), start=zero) for terms in group]
    stacked = torch.cat(torch.broadcast_tensors(*sums)) if len(sums) > 1 else sums[0]
    data = stacked.shape[1:]
    return stacked.expand(math.prod(shape), *data).reshape(*shape, *data)


def _common_scale(terms: list[_Term]) -> Scale:
    """The one scale of all terms inside a logarithm."""
    first = terms[0]
    for term in terms[1:]:
        if not _same(first.scale, term.scale):
            parts = {
                f"{f.name!r}, which takes {f.size} of {f.full_size}"
                for t in (first, term)
                for f in t.site["cond_indep_stack"]
                if f.full_size is not None and f.full_size != f.size
            }
            where = f" (plate {', plate '.join(sorted(parts))})" if parts else ""
            raise ValueError(
                f"sites {first.site['name']!r} and {term.site['name']!r} have scales {_show(first.scale)} and "
                f"{_show(term.scale)}{where} inside one logarithm, where no scale gives a bound for more than one "
                "particle. Use num_particles=1 or all of the data; or make every latent local to the plate, and scale "
                "model and guide alike (annealing: AnnealedELBO)"
            )
    return first.scale


def _same(a: Scale, b: Scale) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        return bool(((a - b).abs() <= 1e-6 * a.abs()).all())
    return math.isclose(a, b, rel_tol=1e-6)


def _show(scale: Scale) -> str:
    if isinstance(scale, Tensor) and scale.numel() > 1:
        return f"a tensor of shape {tuple(scale.shape)}"
    return f"{float(scale):g}"
