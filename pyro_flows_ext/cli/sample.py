"""`pyro-flows sample`: draws from a guide or a density that an earlier run wrote."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyro
from torch import Tensor

from ..diagnostics import to_inference_data
from ..infer import importance
from ..results import SavedDensity, SavedGuide, digest, load
from ..testing.targets import TARGETS
from .failures import complain, failing_with
from .output import Output, npz_bytes
from .targets import load_target

# Draws weighed for each draw that is kept, so that few come twice, and the least for a k-hat.
NUM_WEIGHED, LEAST_WEIGHED = 4, 2000


def sample_command(args: argparse.Namespace, output: Output) -> None:
    """Writes draws to an .npz: `x` of a density, an array for each site of a guide."""
    pyro.set_rng_seed(args.seed)
    with failing_with(2, ValueError, TypeError, OSError):
        saved = load(args.directory)
    draws = _of_density(saved, args) if isinstance(saved, SavedDensity) else _of_guide(saved, args)
    output.save({args.file: npz_bytes(draws)})
    print(f"wrote {args.num_samples} draws to {args.output / args.file}")


def _of_density(saved: SavedDensity, args: argparse.Namespace) -> Mapping[str, np.ndarray]:
    with failing_with(2, ValueError):
        if args.target is not None or args.data is not None:
            raise ValueError(
                "--target, --data: expected neither, since no model is needed to draw from a density"
            )
    with failing_with(1, RuntimeError, ValueError):
        return {"x": saved.density.sample((args.num_samples,)).numpy()}


def _of_guide(saved: SavedGuide, args: argparse.Namespace) -> Mapping[str, np.ndarray]:
    with failing_with(2, ValueError, TypeError, OSError):
        name = saved.target if args.target is None else args.target
        if args.target is None and name not in TARGETS:
            raise ValueError(
                f"{str(args.directory)!r} was fitted to {name!r}, and a file of Python is run only when you name it: "
                f"add --target {name} if you trust it"
            )
        file = saved.data_file if args.data is None else str(args.data)
        target, data = load_target(name, file)
        if digest(data) != saved.data_digest:
            raise ValueError(
                f"{f'data {file!r}' if file else name}: expected the data of the fit, got others; pass those by --data"
            )
    model: Any = partial(target.model, **data) if data else target.model
    with failing_with(1, Exception), failing_with(2, ValueError, TypeError):
        guide = saved.rebuild(model)
        draws = _reweighted(model, guide, args.num_samples)
        exported = to_inference_data(
            model,
            guide,
            draws={name: value.unsqueeze(0) for name, value in draws.items()},
            posterior_predictive=False,
            log_likelihood=False,
        )
    group = exported["posterior"]
    return {str(name): group[name].values[0] for name in group.data_vars}


def _reweighted(model: Any, guide: Any, num_samples: int) -> dict[str, Tensor]:
    """Draws of the guide resampled by their weights; the guide's own, with a warning, where these are not reliable."""
    weights = importance(model, guide, num_samples=max(LEAST_WEIGHED, NUM_WEIGHED * num_samples))
    if weights.reliable:
        return weights.resample(num_samples)
    complain(
        f"warning: draws of the guide itself, which differ from the posterior's: k-hat {weights.k_hat:.2f}, "
        f"ESS {weights.efficiency:.0%}. Draws of chains, where the fit ran some, are in posterior.nc"
    )
    return {name: value[:num_samples] for name, value in weights.samples.items()}
