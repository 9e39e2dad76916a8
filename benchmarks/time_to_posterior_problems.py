"""The posteriors of `time_to_posterior.py`: sixteen with references, eight plain models with simulated data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from plain_models import PLAIN_MODELS, arguments
from targets import TARGETS, Target, load
from targets.ode import growing_grid
from targets.target import flatten
from torch import Tensor

Samples = Mapping[str, Tensor]
# Scalar -> (mean, sd).
Moments = Mapping[str, tuple[float, float]]
# A reference sd whose own relative standard error is larger decides nothing at 15 %.
LARGEST_SD_ERROR = 0.05
NAMES = (*TARGETS, *PLAIN_MODELS)


@dataclass(frozen=True)
class Problem:
    """`model(*args)`, its floating point `dtype`, the arrays of its NumPyro twin, and what to compare.

    `quantities` takes samples, latent site -> `(N, *shape)`, to scalars -> `(N)`. `reference` is None for plain models,
    whose moments come from long runs. The sds of the scalars in `unsettled` are not compared: see `unsettled_sds`.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    dim: int
    dtype: torch.dtype
    numpyro_args: tuple[Any, ...]
    quantities: Callable[[Samples], dict[str, Tensor]]
    reference: Moments | None
    unsettled: frozenset[str] = frozenset()


def problem(name: str) -> Problem:
    """The problem of this name. Raises `ValueError` for a name that is none."""
    if name in PLAIN_MODELS:
        return _plain(name)
    target = load(name)
    reference = {k: (mean, target.reference.sd[k]) for k, mean in target.reference.mean.items()}
    return Problem(
        name,
        target.model,
        target.args,
        target.dim,
        torch.float64,
        _numpyro_args(target),
        target.quantities,
        reference,
        unsettled_sds(target.reference.draws or {}),
    )


def unsettled_sds(draws: Samples, parts: int = 10) -> frozenset[str]:
    """The scalars with tails so long that their draws do not determine the sd, by the sds of tenths of the draws."""

    def error(values: Tensor) -> float:
        sds = torch.stack([part.std() for part in values.tensor_split(parts)])
        return (sds.std() / parts**0.5 / values.std()).item()

    return frozenset(name for name, v in draws.items() if error(v) > LARGEST_SD_ERROR)


def moments(scalars: Samples) -> dict[str, tuple[float, float]]:
    """Mean and sd of each scalar."""
    return {
        name: (v.double().mean().item(), v.double().std().item()) for name, v in scalars.items()
    }


def errors(found: Moments, reference: Moments, unsettled: Collection[str] = ()) -> dict[str, float]:
    """The largest error of a mean in reference sds, and the range of the ratios of sds; infinite where one is not finite."""
    shifts = [abs(found[k][0] - mean) / sd for k, (mean, sd) in reference.items()]
    ratios = [found[k][1] / sd for k, (_, sd) in reference.items() if k not in unsettled]
    if not np.isfinite([*shifts, *ratios]).all():
        return {"mean_error": np.inf, "sd_low": 0.0, "sd_high": np.inf}
    return {"mean_error": max(shifts), "sd_low": min(ratios), "sd_high": max(ratios)}


def is_right(error: Mapping[str, float]) -> bool:
    """Means within .15 sd, sds within 15 %."""
    return error["mean_error"] <= 0.15 and 0.85 <= error["sd_low"] <= error["sd_high"] <= 1.15


def _plain(name: str) -> Problem:
    plain, args = PLAIN_MODELS[name], arguments(name)

    def quantities(samples: Samples) -> dict[str, Tensor]:
        sites = {k: v for k, v in samples.items() if not k.startswith("_")}
        return flatten(plain.to_parameters(sites))

    return Problem(name, plain.model, args, plain.dim, torch.float32, args, quantities, None)


def _numpyro_args(target: Target) -> tuple[Any, ...]:
    """The arguments that are arrays or numbers, and the grid of an ODE with the places of the observations on it."""
    args = tuple(arg for arg in target.args if isinstance(arg, Tensor | int | float))
    if "lotka_volterra" in target.name:
        years = len(args[0])
        grid = np.arange((years - 1) * 18 + 1) / 18
        return *args, grid, np.arange(years) * 18
    if "one_comp" in target.name:
        times = args[0].numpy()
        grid = growing_grid(times, 0.3, 0.17)
        return *args, grid, np.searchsorted(grid, times)
    if target.name == "sblrc-blr":  # the scale of the prior is a tensor here, and bound there
        return args[:2]
    return args
