"""Whether compiled training ends where Pyro's does: the ELBO after the same number of steps, with other draws.

    python benchmarks/svi_elbo.py --output benchmark-output

Five models, each trained by `pyro.infer.SVI` and by `CompiledSVI` in a loop, from the same start, by Adam with a rate that
falls, `--seeds` times with seeds of their own. Printed: the ELBO of each in nats, by means of `--draws` estimates, its mean
over runs and the standard error of that, from the spread of the runs; and the difference in units of its own standard
error. Writes svi_elbo.json.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from svi import GUIDES, MODELS, Problem, vae

from pyro_flows_ext.infer import CompiledSVI


def walk() -> Problem:
    """A random walk of 30 steps, observed with noise, of unknown scales."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(30, generator=generator).cumsum(0) + 0.5 * torch.randn(30, generator=generator)

    def model(y: torch.Tensor) -> None:
        drift = pyro.sample("drift", dist.LogNormal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        x = torch.tensor(0.0)
        for t in range(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, drift))
            pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=y[t])

    return model, (y,), {}


CASES: dict[str, tuple[Callable[[], Problem], str]] = {
    "schools": (MODELS["schools"], "pyro-iaf"),
    "logistic": (MODELS["logistic"], "mvn"),
    "radon": (MODELS["radon"], "normal"),
    "walk": (walk, "normal"),
}


def problem(name: str) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """Model, guide and arguments, the same each time."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if name == "vae":
        model, guide, args = vae()
        return model, guide, args, {}
    make, guide_name = CASES[name]
    model, args, kwargs = make()
    return model, GUIDES[guide_name](model), args, kwargs


def train(name: str, compiled: bool, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """The ELBO at the end, and the seconds of training."""
    model, guide, args, kwargs = problem(name)
    elbo, steps = Trace_ELBO(), options.steps
    optim = pyro.optim.ClippedAdam({"lr": options.lr, "lrd": 0.01 ** (1 / steps)})
    svi: Any = SVI(model, guide, optim, elbo)
    svi.evaluate_loss(
        *args, **kwargs
    )  # makes what the guide makes as it goes, before the seeds part
    pyro.set_rng_seed(seed)
    start = time.perf_counter()
    if compiled:
        svi = CompiledSVI(model, guide, optim, elbo, steps_per_call=50)
        svi.run(steps, *args, **kwargs)
        if svi.fallback_reason is not None:
            raise RuntimeError(f"{name}: {svi.fallback_reason}")
    else:
        for _ in range(steps):
            svi.step(*args, **kwargs)
    seconds = time.perf_counter() - start
    draws = [-svi.evaluate_loss(*args, **kwargs) for _ in range(options.draws)]
    return sum(draws) / len(draws), seconds


def summary(name: str, compiled: bool, options: argparse.Namespace) -> dict[str, Any]:
    """The ELBOs of all runs, their mean and its standard error, and seconds a run."""
    first = 1 + compiled * options.seeds
    runs = [train(name, compiled, first + k, options) for k in range(options.seeds)]
    elbos = torch.tensor([elbo for elbo, _ in runs], dtype=torch.float64)
    return {
        "elbos": elbos.tolist(),
        "mean": elbos.mean().item(),
        "se": (elbos.std() / len(elbos) ** 0.5).item(),
        "seconds": sum(seconds for _, seconds in runs) / len(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CASES, "vae"]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--output", type=Path, help="folder for svi_elbo.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in options.models:
        theirs, ours = (summary(name, compiled, options) for compiled in (False, True))
        z = (ours["mean"] - theirs["mean"]) / (ours["se"] ** 2 + theirs["se"] ** 2) ** 0.5
        rows.append({"model": name, "SVI": theirs, "compiled": ours, "z": z})
        print(
            f"{name:9s} SVI {theirs['mean']:9.2f} ± {theirs['se']:.2f} in {theirs['seconds']:.0f} s, compiled "
            f"{ours['mean']:9.2f} ± {ours['se']:.2f} in {ours['seconds']:.0f} s, difference {z:+.1f} standard errors",
            flush=True,
        )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "svi_elbo.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
