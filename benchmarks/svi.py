"""A step of stochastic variational inference: Pyro's SVI, its jitted ELBO, and compiled.

    python benchmarks/svi.py --output benchmark-output
    python benchmarks/svi.py --models schools --guides normal iaf --particles 1 --steps-per-call 10

Rows are a model, a guide and a number of particles; every column trains the same guide on the same model by Adam.

    SVI         `pyro.infer.SVI` with `Trace_ELBO`
    jit         the same with `JitTrace_ELBO`, where that works
    compiled    `CompiledSVI`, one step a call
    several     `CompiledSVI.run`, `--steps-per-call` steps a call

Times are milliseconds a step, medians over rounds in which all columns run in turn, so that a busy machine slows all of
them alike; ratios are medians over rounds too. What a column was built in are its first two
steps or calls: for the compiled ones tracing, comparing with the handlers, compiling. The posterior is not looked at: given a seed the columns SVI and compiled are the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import iterated
from pyro.distributions.transforms import planar as pyro_planar
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from torch import Tensor, nn

from pyro_flows_ext.cli.targets import TARGETS
from pyro_flows_ext.guides import AutoCIF, AutoIAF, AutoNSF, AutoPlanar, AutoSylvester
from pyro_flows_ext.infer import CompiledSVI

GUIDES: dict[str, Callable[[Any], Any]] = {
    "normal": AutoNormal,
    "mvn": AutoMultivariateNormal,
    "pyro-iaf": partial(AutoIAFNormal, num_transforms=2),
    "pyro-planar": lambda model: AutoNormalizingFlow(model, partial(iterated, 8, pyro_planar)),
    "iaf": AutoIAF,
    "planar": partial(AutoPlanar, num_transforms=16),
    "sylvester": partial(AutoSylvester, num_transforms=4),
    "nsf": AutoNSF,
    "cif": AutoCIF,
}
Problem = tuple[Any, tuple[Any, ...], dict[str, Any]]  # model, args, kwargs


def schools() -> Problem:
    target = TARGETS["eight-schools"]
    return target.model, (), target.data()


def logistic() -> Problem:
    """1000 rows of 50 covariates."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1000, 50, generator=generator)
    y = (X[:, :5].sum(1) + torch.randn(1000, generator=generator) > 0).float()

    def model(X: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        with pyro.plate("data", 1000):
            pyro.sample("y", dist.Bernoulli(logits=(w.unsqueeze(-2) @ X.T).squeeze(-2)), obs=y)

    return model, (X, y), {}


def radon() -> Problem:
    """919 houses in 85 counties: intercepts that vary by county, one slope."""
    generator = torch.Generator().manual_seed(0)
    county = torch.randint(85, (919,), generator=generator)
    floor = (torch.rand(919, generator=generator) < 0.2).float()
    y = 1.5 + 0.3 * torch.randn(85, generator=generator)[county] - 0.6 * floor
    y = y + 0.7 * torch.randn(919, generator=generator)

    def model(county: Tensor, floor: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("counties", 85):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        mean = mu + tau * offset[..., county] + slope * floor
        with pyro.plate("houses", 919):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, (county, floor, y), {}


def vae() -> tuple[Any, Any, tuple[Any, ...]]:
    """A batch of 128 digits of 64 pixels, 10 latents, networks of one hidden layer of 256."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().data[:128] / 16, dtype=torch.float32)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 20))
    decoder = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 64))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 10), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).sigmoid(), 0.1).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (x,)


MODELS: dict[str, Callable[[], Problem]] = {
    "schools": schools,
    "logistic": logistic,
    "radon": radon,
}


def columns(model: Any, guide: Any, particles: int, size: int) -> dict[str, Any]:
    options = {
        "num_particles": particles,
        "vectorize_particles": particles > 1,
        "max_plate_nesting": 1,
    }

    def optim() -> Any:
        return pyro.optim.Adam({"lr": 1e-3})

    elbo = Trace_ELBO(**options)
    return {
        "SVI": SVI(model, guide, optim(), elbo),
        "jit": SVI(model, guide, optim(), JitTrace_ELBO(ignore_jit_warnings=True, **options)),
        "compiled": CompiledSVI(model, guide, optim(), elbo),
        "several": CompiledSVI(model, guide, optim(), elbo, steps_per_call=size),
    }


def run(svi: Any, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Milliseconds a step."""
    start = time.perf_counter()
    if isinstance(svi, CompiledSVI):
        svi.run(count, *args, **kwargs)
    else:
        for _ in range(count):
            svi.step(*args, **kwargs)
    return (time.perf_counter() - start) / count * 1e3


def measure(
    model: Any, guide: Any, args: Any, kwargs: Any, particles: int, options: argparse.Namespace
) -> dict[str, Any]:
    size = options.steps_per_call
    result: dict[str, Any] = {}
    ready: dict[str, Any] = {}
    for name, svi in columns(model, guide, particles, size).items():
        if name == "several" and size < 2:
            continue
        start = time.perf_counter()
        try:
            run(svi, 1 + size if name == "several" else 2, args, kwargs)
        except Exception as error:  # of Pyro's jit, which fails on many guides: the column says so
            result[f"{name} failed"] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        result[f"{name} build"] = time.perf_counter() - start
        if getattr(svi, "why_not", None):
            result[f"{name} failed"] = svi.why_not
            continue
        ready[name] = svi
    rounds = []
    for _ in range(options.rounds):
        counts = {"SVI": 5, "jit": 10, "compiled": 50, "several": 10 * size}
        rounds.append({name: run(svi, counts[name], args, kwargs) for name, svi in ready.items()})
    for name in ready:
        result[name] = statistics.median(r[name] for r in rounds)
        if name != "SVI":
            result[f"SVI / {name}"] = statistics.median(r["SVI"] / r[name] for r in rounds)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "vae"], default=[*MODELS, "vae"])
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--steps-per-call", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rows = []
    for name in options.models:
        for guide_name in ["encoder"] if name == "vae" else options.guides:
            for particles in options.particles:
                pyro.clear_param_store()
                pyro.set_rng_seed(0)
                if name == "vae":
                    model, guide, args = vae()
                    kwargs: dict[str, Any] = {}
                else:
                    model, args, kwargs = MODELS[name]()
                    guide = GUIDES[guide_name](model)
                row = {"model": name, "guide": guide_name, "particles": particles}
                rows.append(row | measure(model, guide, args, kwargs, particles, options))
                print(show(rows[-1]), flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "svi.json").write_text(json.dumps(rows, indent=1))


def show(row: dict[str, Any]) -> str:
    label = f"{row['model']:9s} {row['guide']:12s} {row['particles']:3d}"
    parts = []
    for name in ("SVI", "jit", "compiled", "several"):
        if name in row:
            ratio = row.get(f"SVI / {name}")
            built = f"; built in {row[f'{name} build']:.1f} s" if isinstance(ratio, float) else ""
            parts.append(
                f"{name} {row[name]:.3f} ms" + (f" ({ratio:.1f}x{built})" if ratio else "")
            )
        elif f"{name} failed" in row:
            parts.append(f"{name} - ({row[f'{name} failed']})")
    return f"{label}  " + ", ".join(parts)


if __name__ == "__main__":
    main()
