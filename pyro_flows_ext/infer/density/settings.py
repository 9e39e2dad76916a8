"""The arguments of `fit_density`, checked, and the settings of its runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density
from ...ops import check_automatic
from .._loop import OptimFactory, SchedulerFactory, check_factories, check_settings, decay


@dataclass(frozen=True)
class Settings:
    """The settings of a run, without density and data."""

    num_steps: int
    batch_size: int
    evaluate_every: int
    patience: float
    rate: Callable[[int], float]
    lr: float
    optim: OptimFactory | None
    scheduler: SchedulerFactory | None
    clip_norm: float | None
    callback: Callable[[Any], Any] | None
    checkpoint: str | os.PathLike[str] | None
    progress: bool
    compile: bool | str


def settings_of(given: Mapping[str, Any], num_steps: int) -> Settings:
    """The settings of a run of `num_steps` from the arguments of `fit_density`."""
    every, patience = given["evaluate_every"], given["patience"]
    names = Settings.__dataclass_fields__.keys() & given.keys()
    return Settings(
        **{
            **{name: given[name] for name in names},
            "num_steps": num_steps,
            "evaluate_every": max(1, num_steps // 50) if every is None else every,
            "patience": math.inf if patience is None else patience,
            "rate": decay(given["schedule"], num_steps, given["final_lr"]),
        }
    )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises `ValueError` or `TypeError` for arguments of `fit_density` that are out of range or do not go together."""
    counts = ("num_steps", "batch_size", "evaluate_every", "patience")
    check_settings(
        given["lr"], given["schedule"], **{k: given[k] for k in counts if given[k] is not None}
    )
    for name in ("standardize", "compile"):
        check_automatic(name, given[name])
    if given["resume"] and given["checkpoint"] is None:
        raise ValueError("resume: expected checkpoint=, the file to go on from")
    check_factories(optim=given["optim"], scheduler=given["scheduler"])


def check_density(density: Any) -> Density:
    """The density; raises `TypeError` or `ValueError` for what cannot be trained."""
    if not isinstance(density, Density):
        raise TypeError(
            f"density: expected a Density, such as FlowDistribution, got a {type(density).__name__}"
        )
    parameters = trained(density)
    if not parameters:
        raise ValueError("density: expected one with parameters to train, got none")
    dtypes = {p.dtype for p in parameters}
    if not dtypes <= {torch.float32, torch.float64}:
        raise ValueError(
            f"density: expected parameters of float32 or float64, got {', '.join(map(str, dtypes))}; call density.float()"
        )
    if torch.is_autocast_enabled(parameters[0].device.type):
        raise ValueError(
            "torch.autocast: expected full precision, as log-determinants lose theirs in 16 bits; leave the context manager"
        )
    return density


def check_first_steps(first_steps: int | None, num_steps: int, has_later: bool) -> int:
    """The number of steps of the part that trains first; raises `ValueError` for others than 0 ... num_steps - 1."""
    if first_steps is None:
        return num_steps // 2 if has_later else 0
    if int(first_steps) != first_steps or not 0 <= first_steps < num_steps:
        raise ValueError(
            f"first_steps: expected an integer from 0 to {num_steps - 1}, got {first_steps!r}"
        )
    if first_steps and not has_later:
        raise ValueError("first_steps: expected 0 for a density without a part to train later")
    return int(first_steps)


def trained(density: Density) -> list[Tensor]:
    """The parameters with a gradient."""
    return [p for p in density.parameters() if p.requires_grad]


def trained_later(density: Density) -> list[Tensor]:
    """The parameters of what is `trained_later` in any part of the density; none if nothing else trains."""
    parts: Any = [p.trained_later for p in density.modules() if hasattr(p, "trained_later")]
    later = {p: None for part in parts for p in part.parameters() if p.requires_grad}
    return list(later) if len(later) < len(trained(density)) else []
