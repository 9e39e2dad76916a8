"""Calls of the public interface with drawn inputs; each returns what is wrong with its answer, or None."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from catalogue import CATALOGUE
from densities import DENSITIES

from pyro_flows_ext import guides, infer
from pyro_flows_ext.testing import perturb

from .inputs import as_data, draw

# Above this scale a round trip in float64 loses digits that no check here knows of.
LARGEST = 1e3


def transform(rng: random.Random) -> str | None:
    """A pass of a transform forward or back, and the way back."""
    entry = CATALOGUE[rng.choice(sorted(CATALOGUE))]
    module = perturb(entry.factory()().double(), scale=0.3 * entry.scale).eval()
    event = entry.event_shape or (entry.dim,)
    given = draw(rng, tuple(event), torch.float64)
    if entry.context_dim:
        context = draw(rng, (entry.context_dim,), torch.float64)
        module = module.condition(context.tensor)
        if not (context.fits and context.is_finite and context.scale <= LARGEST):
            return _shapes_only(module, given)
    names = ["forward_and_ladj", "inverse_and_ladj"]
    if rng.random() < 0.5:
        names.reverse()
    x = given.tensor
    if names[0] == "inverse_and_ladj" and tuple(event) != tuple(module.forward_shape(event)):
        return None
    y, ladj = getattr(module, names[0])(x)
    if not given.is_finite or not given.fits or given.scale > LARGEST:
        # A permutation keeps any dtype.
        return None if y.dtype in (torch.float64, x.dtype) else f"dtype {y.dtype}"
    side = module.domain if names[0] == "forward_and_ladj" else module.codomain
    if x.numel() and not bool(side.check(x).all()):
        return None  # outside of the domain
    back, inverse_ladj = getattr(module, names[1])(y)
    for name, value in (("value", y), ("log-det", ladj), ("way back", back)):
        if value.isnan().any():
            return f"NaN in {name} of finite values"
    if not module.codomain.is_discrete and y.isfinite().all():
        errors = (back - x).abs() / (1 + x.abs())
        error = errors.max() if errors.numel() else torch.tensor(0.0)
        if error > 1e-4:
            return f"round trip off by {error:.1e}"
        if not torch.allclose(ladj, -inverse_ladj, atol=1e-3, rtol=1e-3):
            return "log-det and inverse log-det differ"
    return None


def _shapes_only(module: torch.nn.Module, given: object) -> str | None:
    y, ladj = module.forward_and_ladj(given.tensor)  # type: ignore[attr-defined, operator]
    return None if ladj.dim() <= y.dim() else f"log-det of shape {tuple(ladj.shape)}"


def density(rng: random.Random) -> str | None:
    """Log-densities and draws."""
    entry = DENSITIES[rng.choice(sorted(DENSITIES))]
    module = perturb(entry.make().double(), scale=0.3 * entry.scale).eval()
    if entry.context_dim:
        context = draw(rng, (entry.context_dim,), torch.float64)
        module = module.condition(context.tensor)
        if not (context.fits and context.is_finite and context.scale <= LARGEST):
            return None
    given = draw(rng, tuple(module.event_shape), torch.float64)
    log_p = module.log_prob(given.tensor)
    batch = given.tensor.shape[: given.tensor.dim() - len(module.event_shape)]
    expected = torch.broadcast_shapes(batch, module.batch_shape)
    if log_p.shape != expected:
        return f"log_prob of shape {tuple(log_p.shape)}, not {tuple(expected)}"
    if given.is_finite and (log_p.isnan().any() or (log_p == math.inf).any()):
        return "log-density NaN or infinite at finite values"
    if not given.is_finite and log_p.isfinite().all() and log_p.numel() == 1:
        return "a finite log-density at NaN or infinity"
    return None if module.sample((2,)).isfinite().all() else "draws that are not finite"


def fit_density(rng: random.Random) -> str | None:
    """Two steps on drawn data: finite losses."""
    name = rng.choice(
        ["flow-planar", "flow-maf", "flow-nsf", "indexed-maf", "flow-vae", "nested-dropout"]
    )
    module = DENSITIES[name].make()
    given = draw(rng, tuple(module.event_shape), torch.float32)
    weights = draw(rng, (), torch.float32).tensor if rng.random() < 0.1 else None
    data = as_data(rng, given.tensor)
    result = infer.fit_density(
        module,
        data,
        weights=weights,
        validation=rng.choice([None, 0.1, 0.5]),
        standardize=rng.choice(["auto", "auto", True, False]),
        num_steps=2,
        batch_size=rng.choice([1, 4, 256]),
        progress=False,
        seed=0,
    )
    finite = result.losses.isfinite().all()
    return None if finite or result.skipped_steps else "losses that are not finite"


def _model(x: torch.Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide(rng: random.Random) -> str | None:
    """Importance weights of a guide that was set up on drawn data."""
    given = draw(rng, (), torch.float32)
    made = guides.AutoFlow(_model, rng.choice(["planar", "nsf", "iaf"]))
    made(given.tensor)
    result = infer.importance(_model, made, given.tensor, num_samples=50)
    weights = result.log_weights
    return "NaN among the weights" if given.is_finite and weights.isnan().any() else None


def fit(rng: random.Random) -> str | None:
    """A short run on drawn data."""
    given = draw(rng, (), torch.float32)
    made = guides.AutoFlow(_model, "nsf")
    result = infer.fit(
        _model, made, given.tensor, num_steps=3, warm_start=False, refine=False, progress=False
    )
    return None if isinstance(result.steps, int) else "no steps"


def command(rng: random.Random) -> str | None:
    """`pyro-flows density` on a drawn file: exit code 0 with files, or one line."""
    from pyro_flows_ext.cli import main

    given = draw(rng, (2,), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        width = given.tensor.shape[-1] if given.tensor.dim() else 1
        rows = given.tensor.reshape(given.tensor.numel() // max(width, 1), width)
        lines = [",".join(f"c{i}" for i in range(rows.shape[-1]))]
        lines += [",".join(map(str, row)) for row in rows.repeat(rng.choice([1, 20]), 1).tolist()]
        path.write_text("\n".join(lines))
        try:
            code = main(
                ["density", str(path), "--steps", "2", "--quiet", "--output", f"{folder}/out"]
            )
        except SystemExit as end:
            code = end.code
        written = (Path(folder) / "out" / "density.pt").exists()
    return None if bool(code) != written else f"exit code {code}, files {written}"


# Share of each kind among the calls.
CALLS: dict[Callable[[random.Random], str | None], int] = {
    transform: 600,
    density: 250,
    fit_density: 100,
    guide: 35,
    fit: 10,
    command: 5,
}
