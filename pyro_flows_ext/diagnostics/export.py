"""Draws of a guide in ArviZ's form, of either generation: `InferenceData` (0.x) or `DataTree` (1.x)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..infer.importance import model_first
from ..ops import check_automatic
from ..programs import (
    LogJoint,
    Particles,
    Program,
    draw_particles,
    read_latent,
    vectorization_error,
)

Site = Mapping[str, Any]

# Draws of the model run in one pass: as many as `draw_particles` takes, for the same memory.
CHUNK_SIZE = 1000
# Numbers of the log likelihood that `log_likelihood="auto"` writes: 40 MB in single precision. It has one for every draw
# and datum, and soon outweighs the rest by far.
MAX_LOG_LIKELIHOOD = 10**7


@torch.no_grad()
def to_inference_data(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1000,
    draws: Mapping[str, Tensor] | None = None,
    posterior_predictive: bool = True,
    log_likelihood: bool | str = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    **kwargs: Any,
) -> Any:
    """Draws of the guide as one chain: `arviz.InferenceData` under ArviZ 0.x, `xarray.DataTree` under 1.x.

    Non-empty groups of:
        posterior             latent sites and `pyro.deterministic` ones, constrained
        sample_stats          `lp`, the log joint, and `log_weight` = log p(x, z) / q(z)
        log_likelihood        a value for each draw and datum of every observed site
        posterior_predictive  new data for every observed site
        observed_data         the data

    The dimension of `pyro.plate("J", ...)` is named J, with coordinates 0, 1, ...; other dimensions have ArviZ's names,
    `<site>_dim_<position>`. `pyro.factor` is part of lp alone. Draws are not reweighted.

    Args:
        model, guide: Pyro programs.
        args, kwargs: their arguments.
        num_samples: number of draws.
        draws: latent site -> `(chain, draw, *shape)`, in place of the guide's; then there is no `log_weight`.
        posterior_predictive: whether to draw new data.
        log_likelihood: True, False, or "auto": only up to 10^7 values in all.
        coords: labels of a dimension, by its name.

    Raises:
        ValueError: under a subsampled plate, for `coords` of no dimension, and for an observed site that cannot be
            sampled (then pass `posterior_predictive=False`).
    """
    check_automatic("log_likelihood", log_likelihood)
    model, guide = model_first(model, guide)
    if draws is None:
        particles = draw_particles(model, guide, args, kwargs, num_samples=num_samples)
        num_chains, num_draws = 1, num_samples
        stats = {"lp": particles.log_joint, "log_weight": particles.log_weights}
    else:
        particles = _evaluate(model, draws, args, kwargs)
        num_chains, num_draws = next(iter(draws.values())).shape[:2]
        stats = {"lp": particles.log_joint}
    sites = _sites(model, {k: v[0] for k, v in particles.samples.items()}, args, kwargs)
    observed = {
        name: site
        for name, site in sites.items()
        if name not in particles.samples and not _is_deterministic(site)
    }
    wanted = [name for name, site in sites.items() if _is_deterministic(site)]
    if posterior_predictive:
        wanted += list(observed)
    vectorized = vectorization_error(model, guide, args, kwargs) is None
    replayed = _replay(model, particles.samples, sites, wanted, args, kwargs, vectorized)

    groups: dict[str, dict[str, Tensor]] = {
        "posterior": {
            **particles.samples,
            **{name: replayed[name] for name in wanted if name not in observed},
        },
        "sample_stats": stats,
        "log_likelihood": _chosen(particles.log_likelihood, observed, log_likelihood),
        "posterior_predictive": {name: replayed[name] for name in wanted if name in observed},
    }
    arrays = {
        group: {name: _by_chain(value, (num_chains, num_draws)) for name, value in values.items()}
        for group, values in groups.items()
    }
    arrays["observed_data"] = {name: _to_numpy(_data(site)) for name, site in observed.items()}
    return _from_groups(
        {group: values for group, values in arrays.items() if values},
        _coords(sites, coords or {}),
        {name: _dims(name, site) for name, site in sites.items()},
    )


def _evaluate(
    model: Program, draws: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Particles:
    """Given draws by chain as particles, with their log joint and log likelihood."""
    samples = {name: value.flatten(0, 1) for name, value in draws.items()}
    with poutine.block():
        first = poutine.condition(model, {name: value[0] for name, value in samples.items()})
        trace = poutine.trace(first).get_trace(*args, **kwargs)
    # Guides have auxiliary sites of their own, such as the unconstrained values of AutoNormal.
    samples = {name: value for name, value in samples.items() if name in trace.nodes}
    latents = [read_latent(name, trace.nodes[name]) for name in samples]
    log_joint, log_likelihood = LogJoint(model, args, kwargs, latents=latents).at(samples)
    unknown = torch.full_like(log_joint, torch.nan)
    return Particles(samples, log_joint, unknown, log_likelihood)


def _by_chain(value: Tensor, shape: tuple[int, int]) -> np.ndarray:
    array = _to_numpy(value)
    return array.reshape(*shape, *array.shape[1:])


def _chosen(
    log_likelihood: dict[str, Tensor], observed: dict[str, Site], wanted: bool | str
) -> dict[str, Tensor]:
    """The log likelihood of the observed sites, or nothing where it is not wanted."""
    values = {name: log_likelihood[name] for name in observed}
    if wanted == "auto":
        wanted = sum(value.numel() for value in values.values()) <= MAX_LOG_LIKELIHOOD
    return values if wanted else {}


# --- the two ArviZ ---


def _from_groups(
    groups: dict[str, dict[str, np.ndarray]],
    coords: dict[str, np.ndarray],
    dims: dict[str, list[str]],
) -> Any:
    """ArviZ's object from groups of arrays `(chain, draw, *shape)`; `observed_data` has neither chain nor draw."""
    with warnings.catch_warnings():
        # ArviZ 0.23 announces 1.x on import; both are served here.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz
    # By version: to a question for a name that is gone, such as InferenceData, 1.x has a warning and a stand-in.
    from_dict: Any = arviz.from_dict
    with warnings.catch_warnings():
        # ArviZ 0.x and 1.x warn of swapped dimensions, but many short chains are intended.
        warnings.filterwarnings("ignore", "More chains|Found chain dimension", UserWarning)
        if int(arviz.__version__.split(".")[0]) < 1:
            return from_dict(**groups, coords=coords, dims=dims)
        return from_dict(groups, coords=coords, dims=dims)


# --- the model ---


def _sites(
    model: Program, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Site]:
    """The model's sites with something to export: latents at `values`, deterministic sites and data."""
    with poutine.block():
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not isinstance(site["fn"], dist.Unit)  # pyro.factor
    }


class _NewData(UnconditionMessenger):
    """Samples the data, and only the data: a deterministic site drawn anew would repeat the plates it is in."""

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_deterministic(msg) and not isinstance(msg["fn"], dist.Unit):
            super()._pyro_sample(msg)


def _is_deterministic(site: Site) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _data(site: Site) -> Tensor:
    """The observed value at the full shape of its site: a plate may have spread one number over many."""
    return site["value"].expand(site["fn"].shape())


def _replay(
    model: Program,
    samples: dict[str, Tensor],
    sites: dict[str, Site],
    wanted: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    vectorized: bool,
) -> dict[str, Tensor]:
    """Runs the model at every draw, data sampled anew where they are wanted; the `wanted` sites, `(N, *shape)`.

    In place of `pyro.infer.Predictive`, whose parallel form counts the event dimensions of a latent as plates.
    """
    if not wanted:
        return {}
    num = len(next(iter(samples.values())))
    nesting = max((-f.dim for site in sites.values() for f in _plates(site)), default=0)

    def run(first: int, last: int, together: bool) -> dict[str, Tensor]:
        program, data = _NewData()(model), {}
        for name, value in samples.items():
            shape = list(value.shape[1:])
            if together:
                batch_dim = len(shape) - sites[name]["fn"].event_dim
                shape = [last - first] + [1] * (nesting - batch_dim) + shape
            data[name] = value[first:last].reshape(shape)
        if together:
            program = pyro.plate("num_draws_vectorized", last - first, dim=-nesting - 1)(program)
        with poutine.block():
            trace = poutine.trace(poutine.condition(program, data)).get_trace(*args, **kwargs)
        return {n: _per_draw(trace.nodes[n], sites[n], last - first) for n in wanted}

    try:
        if vectorized and num > 1:
            # A log joint that is right in a batch does not imply that deterministic sites are, such as a sum over a latent.
            both, alone = run(0, 2, True), [run(i, i + 1, False) for i in (0, 1)]
            vectorized = all(
                torch.allclose(both[n][i], alone[i][n][0], rtol=1e-4, atol=1e-6, equal_nan=True)
                for n in wanted
                if _is_deterministic(sites[n])
                for i in (0, 1)
            )
        step = CHUNK_SIZE if vectorized else 1
        chunks = [run(i, min(i + step, num), vectorized) for i in range(0, num, step)]
    except NotImplementedError as error:
        raise ValueError(
            "posterior_predictive: an observed site has a distribution that cannot be sampled; "
            "pass posterior_predictive=False"
        ) from error
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in wanted}


def _per_draw(replayed: Site, site: Site, num: int) -> Tensor:
    value, shape = replayed["value"], _shape(site)
    if value.numel() == shape.numel() and num > 1:  # the same for every draw
        return value.reshape(shape).expand(num, *shape)
    return value.reshape(num, *shape)


# --- names of dimensions ---


def _plates(site: Site) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _dims(name: str, site: Site) -> list[str]:
    ndim, event_dim = len(_shape(site)), site["fn"].event_dim
    if _is_deterministic(site) and event_dim == site["value"].dim():
        event_dim = (
            0  # `pyro.deterministic` declares every dimension an event's, those of plates too
        )
    dims = [f"{name}_dim_{i}" for i in range(ndim)]
    for frame in _plates(site):
        axis = ndim - event_dim + frame.dim
        # `chain` and `draw` are ArviZ's own; a plate may also be wider than a deterministic value within it.
        if axis >= 0 and _shape(site)[axis] == frame.size and frame.name not in ("chain", "draw"):
            dims[axis] = frame.name
    return dims


def _shape(site: Site) -> torch.Size:
    return site["value"].shape if _is_deterministic(site) else site["fn"].shape()


def _coords(sites: dict[str, Site], labels: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """Integers for the plates, `labels` wherever given."""
    sizes = {
        dim: size
        for name, site in sites.items()
        for dim, size in zip(_dims(name, site), _shape(site), strict=True)
    }
    for dim, values in labels.items():
        if dim not in sizes:
            raise ValueError(f"coords: expected dimensions among {sorted(sizes)}, got {dim!r}")
        if len(values) != sizes[dim]:
            raise ValueError(f"coords[{dim!r}]: expected {sizes[dim]} labels, got {len(values)}")
    return {dim: np.asarray(labels.get(dim, np.arange(size))) for dim, size in sizes.items()}


def _to_numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
