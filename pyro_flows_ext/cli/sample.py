"""`pyro-flows sample`: draws from a guide or a density that an earlier run wrote."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyro
from torch import Tensor

from ..datasets import load_rows, table_bytes
from ..diagnostics import flatten_samples, to_inference_data
from ..infer import importance
from ..results import SavedDensity, SavedGuide, digest, load
from ..testing.targets import TARGETS, load_target
from .failures import complain, failing_with
from .output import Output, npz_bytes

# Draws weighed for each draw that is kept, so that few come twice, and the least for a k-hat.
NUM_WEIGHED, LEAST_WEIGHED = 4, 2000


def sample_command(args: argparse.Namespace, output: Output) -> None:
    """Writes draws: to an .npz, an array for each site or `x`; to a table, a column for each number."""
    pyro.set_rng_seed(args.seed)
    with failing_with(2, ValueError, TypeError, OSError):
        saved = load(args.directory)
    draws = _of_density(saved, args) if isinstance(saved, SavedDensity) else _of_guide(saved, args)
    if args.suffix == ".npz":
        content = npz_bytes(draws)
    else:
        with failing_with(1, ValueError):
            content = table_bytes(args.suffix, _columns_of(draws))
    output.save({args.file: content})
    print(f"wrote {args.num_samples} draws to {args.output / args.file}")


def _of_density(saved: SavedDensity, args: argparse.Namespace) -> Mapping[str, np.ndarray]:
    """Draws `x` and the names of their columns; with contexts, so many for each, in their order."""
    density: Any = saved.density
    with failing_with(2, ValueError, OSError):
        if args.target is not None or args.data is not None:
            raise ValueError(
                "--target, --data: expected neither, since no model is needed to draw from a density"
            )
        if bool(density.context_dim) != (args.context is not None):
            names = ", ".join(saved.context_columns or ())
            raise ValueError(
                f"--context: expected a file with the columns {names}, at which to draw"
                if density.context_dim
                else "--context: expected none for a density that was trained without"
            )
        context = None
        if args.context is not None:
            columns = load_rows(args.context, columns=saved.context_columns, min_rows=1)
            context = columns.values
    named = {} if saved.columns is None else {"columns": np.array(saved.columns)}
    with failing_with(1, RuntimeError, ValueError):
        if context is None:
            return {"x": density.sample((args.num_samples,)).numpy(), **named}
        repeated = context.repeat_interleave(args.num_samples, 0)
        x = density.condition(repeated).sample()
        at = {"context": repeated.numpy(), "context_columns": np.array(saved.context_columns)}
        return {"x": x.numpy(), **named, **at}


def _columns_of(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A column for each number: of a density by the names of its columns, contexts first; of a guide by site."""
    if "columns" not in draws:
        return flatten_samples(draws)
    flat: dict[str, np.ndarray] = {}
    for values, names in (("context", "context_columns"), ("x", "columns")):
        if values in draws:
            table = draws[values].reshape(len(draws[values]), -1)
            flat.update(zip(map(str, draws[names]), table.T, strict=True))
    return flat


def _of_guide(saved: SavedGuide, args: argparse.Namespace) -> Mapping[str, np.ndarray]:
    with failing_with(2, ValueError, TypeError, OSError):
        name = saved.target if args.target is None else args.target
        if args.context is not None:
            raise ValueError("--context: expected none for a guide; its data come by --data")
        if args.target is None and name not in TARGETS:
            raise ValueError(
                f"{str(args.directory)!r} was fitted to {name!r}, and a file of Python is run only when you name it: "
                f"add --target {name} if you trust it"
            )
        file = saved.data_file if args.data is None else str(args.data)
        target, data = load_target(name, file, args.columns)
        if saved.data_digest is not None and digest(data) != saved.data_digest:
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
