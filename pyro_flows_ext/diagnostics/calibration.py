"""Simulation-based calibration: are the draws of a guide, on data from the model, those of its posteriors?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from ..ops import check_positive
from ..programs import (
    Program,
    in_particles,
    latent_sites,
    nesting_of,
    sample_sites,
    vectorization_error,
)
from .summary import flatten_samples

# (num_draws, *args, **kwargs) -> {site: (num_draws, *shape)}
Sampler = Callable[..., Mapping[str, Tensor]]

# Bins of ranks: no more than this, and with at least so many ranks each, by which a chi-square is one.
MAX_BINS, MIN_EXPECTED = 20, 5
# Below this probability, corrected for the number of parameters, the ranks are called uneven.
LEVEL = 0.01
MAX_ROWS = 12


@dataclass(frozen=True)
class CalibrationResult:
    """Ranks of true values among draws, by scalar parameter: `(R)`, integers from 0 to `num_draws`.

    They are uniform where the draws are the posterior's. One that is local to a plate that holds all latents has a rank
    for every datum, otherwise one for every simulation.
    """

    ranks: dict[str, np.ndarray] = field(repr=False)
    num_draws: int

    @property
    def edges(self) -> np.ndarray:
        """The first rank of each bin, and at last `num_draws` + 1."""
        num_ranks = min(len(ranks) for ranks in self.ranks.values())
        most = min(MAX_BINS, num_ranks // MIN_EXPECTED, self.num_draws + 1)
        # Bins of the same size where they are not far fewer.
        even = [b for b in range((most + 1) // 2, most + 1) if (self.num_draws + 1) % b == 0]
        num_bins = max(even, default=most)
        return np.linspace(0, self.num_draws + 1, num_bins + 1).round().astype(int)

    def counts(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """How many ranks of a parameter are in each bin, and how many are expected."""
        ranks = self.ranks[name]
        counts = np.histogram(ranks, self.edges - 0.5)[0]
        return counts, len(ranks) * np.diff(self.edges) / (self.num_draws + 1)

    @property
    def p_values(self) -> dict[str, float]:
        """Pearson's chi-square for uniform ranks, by parameter."""
        return {name: _chi_square(*self.counts(name)) for name in self.ranks}

    @property
    def p_value(self) -> float:
        """The smallest p-value times the number of parameters (Bonferroni), at most 1."""
        return min(1.0, len(self.ranks) * min(self.p_values.values()))

    def shape(self, name: str) -> tuple[float, float]:
        """Standard scores of the ranks' mean and spread, about N(0, 1) for uniform ranks.

        A high mean: draws lie too low. A high spread: draws lie too close together, and ranks at the ends.
        """
        ranks, L = self.ranks[name], self.num_draws
        v = (ranks + 0.5) / (L + 1) - 0.5
        # Variance and fourth central moment of the discrete uniform on L + 1 values in (-1/2, 1/2).
        variance = (1 - (L + 1) ** -2) / 12
        grid = (np.arange(L + 1) + 0.5) / (L + 1) - 0.5
        fourth = (grid**4).mean() - variance**2
        root = len(ranks) ** 0.5
        mean = v.mean() / variance**0.5 * root
        spread = ((v**2).mean() - variance) / fourth**0.5 * root if fourth > 0 else 0.0
        return float(mean), float(spread)

    def __str__(self) -> str:
        p_values = self.p_values
        rows = sorted(p_values, key=p_values.__getitem__)
        num_ranks = {len(ranks) for ranks in self.ranks.values()}
        lines = [
            f"ranks among {self.num_draws} draws, {'/'.join(map(str, sorted(num_ranks)))} of each parameter",
            f"{'parameter':<16}{'p-value':>10}{'mean (z)':>10}{'spread (z)':>12}",
        ]
        for name in rows[:MAX_ROWS]:
            mean, spread = self.shape(name)
            lines.append(f"{name:<16}{p_values[name]:>10.2g}{mean:>10.1f}{spread:>12.1f}")
        if len(rows) > MAX_ROWS:
            lines.append(f"... and {len(rows) - MAX_ROWS} of higher p-values")
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """In words: whether the ranks are uneven, and how the draws of the worst parameter are off."""
        p_values = self.p_values
        uneven = [name for name, p in p_values.items() if len(p_values) * p < LEVEL]
        if not uneven:
            return (
                f"No sign of miscalibration (p = {self.p_value:.2g} over all parameters). Ranks mix all data that the model "
                "makes: errors that cancel out over them do not show."
            )
        worst = min(uneven, key=p_values.__getitem__)
        mean, spread = self.shape(worst)
        if abs(spread) >= abs(mean):
            how = "too close together" if spread > 0 else "too far apart"
        else:
            how = "too low" if mean > 0 else "too high"
        return (
            f"Miscalibrated: {len(uneven)} of {len(p_values)} parameters have uneven ranks (p = {self.p_value:.2g} over all); "
            f"the draws of {worst} are {how}."
        )


@torch.no_grad()
def simulation_based_calibration(
    model: Program,
    guide: Program | None,
    *args: Any,
    sampler: Sampler | None = None,
    to_args: Callable[[dict[str, Tensor]], tuple[Any, ...]] | None = None,
    num_simulations: int = 200,
    num_draws: int = 99,
    thin: int = 1,
    **kwargs: Any,
) -> CalibrationResult:
    """Ranks of latents drawn from the prior among draws of the guide given data simulated from them.

    They are uniform for exact posteriors. Each simulation runs `model(*args, **kwargs)` with its observations drawn,
    replaces the data among the arguments by the simulated ones, and draws from `guide` on these arguments. If every
    latent is local to a plate, every datum counts as a simulation. Ties are broken at random.

    Args:
        model: a Pyro model.
        guide: a guide amortized over the data; None with a `sampler`.
        args, kwargs: the model's arguments. Arguments that are the value of an observed site are the data.
        sampler: `sampler(num, *args, **kwargs)` -> `{site: (num, *shape)}`, e.g. MCMC, or a guide that is fitted anew.
        to_args: from `{observed site: value}` to the arguments, if no argument is the value of an observed site.
        num_simulations: number of simulations.
        num_draws: draws in each.
        thin: of correlated draws, every `thin`-th counts.

    Raises:
        ValueError: for an observed site without an argument, for factors, which cannot be simulated, and for fewer than
            ten ranks.

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman 2018, Validating Bayesian Inference Algorithms with
        Simulation-Based Calibration.
    """
    check_positive("num_simulations", num_simulations)
    check_positive("num_draws", num_draws)
    check_positive("thin", thin)
    trace = _trace(model, args, kwargs)
    observed = _observed(trace)
    replace = _replacement(observed, args, kwargs, to_args)
    draw = _sampler(model, guide, sampler, args, kwargs)
    plates = _common_plates(trace)
    ranks: dict[str, list[Tensor]] = {}
    for _ in range(num_simulations):
        simulated = dict(sample_sites(_trace(poutine.uncondition(model), args, kwargs)))
        new_args, new_kwargs = replace({name: simulated[name]["value"] for name in observed})
        draws = draw(num_draws * thin, *new_args, **new_kwargs)
        for name, site in latent_sites(trace):
            if name in draws:
                rank = rank_among(simulated[name]["value"], draws[name][thin - 1 :: thin])
                ranks.setdefault(name, []).append(_pooled(rank, site, plates))
    flat = flatten_samples({name: torch.cat(parts) for name, parts in ranks.items()})
    if not flat or min(map(len, flat.values())) < 2 * MIN_EXPECTED:
        raise ValueError(
            f"num_simulations: expected at least {2 * MIN_EXPECTED} ranks of every latent, got "
            f"{min(map(len, flat.values()), default=0)}"
        )
    return CalibrationResult({k: v.astype(int) for k, v in flat.items()}, num_draws)


def _trace(program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    with poutine.block():
        return poutine.trace(program).get_trace(*args, **kwargs)


def _observed(trace: Trace) -> dict[str, Tensor]:
    """The observed sites and their values."""
    values = {}
    for name, site in sample_sites(trace):
        if (
            not site["is_observed"]
            or site_is_subsample(site)
            or site["infer"].get("_deterministic")
        ):
            continue
        if site_is_factor(site):
            raise ValueError(
                f"factor {name!r}: expected a model that data can be drawn from, got a factor; use an observed site"
            )
        values[name] = site["value"]
    if not values:
        raise ValueError("model: expected an observed site on these arguments, got none")
    return values


def _replacement(
    observed: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    to_args: Callable[[dict[str, Tensor]], tuple[Any, ...]] | None,
) -> Callable[[dict[str, Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """From simulated values of the observed sites to arguments with these values in place of the data."""
    if to_args is not None:
        return lambda values: (to_args(values), kwargs)
    keys: list[int | str] = [*range(len(args)), *kwargs]
    arguments = [*args, *kwargs.values()]
    places: dict[int | str, str] = {}
    for name, value in observed.items():
        found = [k for k, a in zip(keys, arguments, strict=True) if _same(a, value)]
        if not found:
            raise ValueError(
                f"observed site {name!r}: expected its value among the arguments, got none that equals it; give to_args, "
                "which makes the arguments from {observed site: value}"
            )
        places.update(dict.fromkeys(found, name))

    def replace(values: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def new(key: int | str, old: Any) -> Any:
            return values[places[key]].reshape(old.shape) if key in places else old

        return (
            tuple(new(i, a) for i, a in enumerate(args)),
            {k: new(k, v) for k, v in kwargs.items()},
        )

    return replace


def _same(argument: Any, value: Tensor) -> bool:
    return argument is value or (
        isinstance(argument, Tensor)
        and argument.shape == value.shape
        and bool(torch.equal(argument, value))
    )


def _sampler(
    model: Program,
    guide: Program | None,
    sampler: Sampler | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Sampler:
    """The sampler, or draws of the guide: all at once where model and guide can."""
    if guide is None:
        if sampler is None:
            raise ValueError("guide: expected a guide, or None and a sampler")
        return sampler
    if sampler is not None:
        raise ValueError("guide: expected None beside a sampler; only one of them can be judged")
    at_once = vectorization_error(model, guide, args, kwargs) is None
    nesting = nesting_of(_trace(model, args, kwargs), _trace(guide, args, kwargs))

    def draw(num: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not at_once:
            runs = [latent_sites(_trace(guide, args, kwargs)) for _ in range(num)]
            values = [{name: site["value"] for name, site in run} for run in runs]
            return {name: torch.stack([v[name] for v in values]) for name in values[0]}
        shapes = {n: s["value"].shape for n, s in latent_sites(_trace(guide, args, kwargs))}
        trace = _trace(in_particles(guide, num, nesting), args, kwargs)
        return {n: s["value"].reshape(num, *shapes[n]) for n, s in latent_sites(trace)}

    return draw


def rank_among(value: Tensor, draws: Tensor) -> Tensor:
    """How many draws lie below the value, elementwise; a random part of those that equal it."""
    ties = (draws == value).sum(0)
    share = torch.rand(ties.shape, device=ties.device)
    return (draws < value).sum(0) + (share * (ties + 1)).floor().long().clamp(max=ties)


def _common_plates(trace: Trace) -> frozenset[str]:
    """The plates that all latents lie in: their data are independent of one another."""
    stacks = [site["cond_indep_stack"] for _, site in latent_sites(trace)]
    return frozenset.intersection(
        *(frozenset(f.name for f in stack if f.vectorized) for stack in stacks)
    )


def _pooled(rank: Tensor, site: Mapping[str, Any], plates: frozenset[str]) -> Tensor:
    """Ranks `(*plates, *event)` with the dimensions of `plates` in front, as one: `(data, *rest)`."""
    batch_dims = rank.dim() - site["fn"].event_dim
    dims = [batch_dims + f.dim for f in site["cond_indep_stack"] if f.name in plates]
    dims.sort()
    moved = rank.movedim(dims, list(range(len(dims))))
    return moved.reshape(-1, *moved.shape[len(dims) :])


def _chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """The probability of a Pearson statistic as large, with one degree of freedom less than there are bins."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    halves = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(halves[0], halves[1]).item()
