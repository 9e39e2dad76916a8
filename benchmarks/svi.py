"""A step of stochastic variational inference: Pyro's SVI, its jitted ELBO, compiled, and NumPyro's.

    python benchmarks/svi.py --numpyro --output benchmark-output
    python benchmarks/svi.py --models schools --guides normal iaf --particles 1 --steps-per-call 10

Rows are a model, a guide and a number of particles; every column trains the same guide on the same model by Adam.

    SVI         `pyro.infer.SVI` with `Trace_ELBO`
    jit         the same with `JitTrace_ELBO`, where that works
    eager       `CompiledSVI(backend="eager")`: the traced graph, interpreted
    compiled    `CompiledSVI`, one step a call
    several     `CompiledSVI.run`, `--steps-per-call` steps a call
    numpyro     with `--numpyro`: NumPyro's jitted `update` in a loop, the loss a float each step
    unfetched   the same, with losses that nobody reads
    scan        `lax.scan` over `--steps-per-call` updates of NumPyro's

NumPyro has an environment of its own, which is made where `--numpyro-env` says unless it is there (it needs Python 3.11 or
later, and .6 GB); its columns are empty for guides that it does not have. All processes use `--threads` threads.

Times are milliseconds a step, medians over rounds in which all columns run in turn, so that a busy machine slows all of
them alike; ratios are medians over rounds too. What a column was built in are its first two steps or calls: for the
compiled ones tracing, comparing with the handlers, compiling. The posterior is not looked at: given a seed the columns
SVI and compiled are the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpyro_environment import DEFAULT, interpreter, variables
from pyro.distributions.transforms import iterated
from pyro.distributions.transforms import planar as pyro_planar
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, autoguide
from torch import Tensor, nn

import pyro_flows_ext
from pyro_flows_ext.guides import AutoCIF, AutoIAF, AutoNSF, AutoPlanar, AutoSylvester
from pyro_flows_ext.infer import CompiledSVI
from pyro_flows_ext.testing.targets import TARGETS

GUIDES: dict[str, Callable[[Any], Any]] = {
    "normal": autoguide.AutoNormal,
    "mvn": autoguide.AutoMultivariateNormal,
    "pyro-iaf": partial(autoguide.AutoIAFNormal, num_transforms=2),
    "pyro-planar": lambda model: autoguide.AutoNormalizingFlow(
        model, partial(iterated, 8, pyro_planar)
    ),
    "iaf": AutoIAF,
    "planar": partial(AutoPlanar, num_layers=16),
    "sylvester": partial(AutoSylvester, num_layers=4),
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
            # Particles come with a place for the plate, which is the product's last dimension.
            logits = (w @ X.T).reshape(*w.shape[:-2], len(X))
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

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


# --- columns ---

Column = Callable[[int], float]  # takes so many steps; milliseconds a step
RATIOS = (("compiled", "numpyro"), ("several", "scan"))  # besides "SVI / ..." of every column


class NumPyro:
    """NumPyro in an environment and a process of its own, asked for one round of one column at a time."""

    def __init__(self, env: Path, threads: int) -> None:
        command = [interpreter(env), Path(__file__).with_name("svi_numpyro.py")]
        self.process = subprocess.Popen(
            command,
            env=variables(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        reply = self._read()
        if "failed" in reply:
            raise RuntimeError(reply["failed"])
        return reply

    def columns(
        self, row: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], size: int
    ) -> dict[str, Column]:
        """Its columns for a row, on the same data."""
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.npz"
            arrays = {f"arg{i}": value for i, value in enumerate(args)} | kwargs
            np.savez(data, **{name: value.numpy() for name, value in arrays.items()})
            names = self.ask(**row, steps_per_call=size, data=str(data))["columns"]
        return {name: partial(self.milliseconds, name) for name in names}

    def milliseconds(self, column: str, count: int) -> float:
        return float(self.ask(column=column, count=count)["ms"])

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"NumPyro's process ended with code {self.process.wait()}")
        return json.loads(line)  # type: ignore[no-any-return]


def our_columns(
    model: Any, guide: Any, args: Any, kwargs: Any, particles: int, size: int
) -> dict[str, Column]:
    """Pyro's and ours."""
    elbo, jitted = (
        kind(num_particles=particles, max_plate_nesting=1, vectorize_particles=particles > 1)
        for kind in (Trace_ELBO, partial(JitTrace_ELBO, ignore_jit_warnings=True))
    )

    def optim() -> Any:
        return pyro.optim.Adam({"lr": 1e-3})

    runs = {
        "SVI": SVI(model, guide, optim(), elbo),
        "jit": SVI(model, guide, optim(), jitted),
        "eager": CompiledSVI(model, guide, optim(), elbo, backend="eager"),
        "compiled": CompiledSVI(model, guide, optim(), elbo),
    }
    if size > 1:
        runs["several"] = CompiledSVI(model, guide, optim(), elbo, steps_per_call=size)
    return {name: partial(take, svi, args, kwargs) for name, svi in runs.items()}


def take(svi: Any, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> float:
    """Milliseconds a step."""
    start = time.perf_counter()
    if isinstance(svi, CompiledSVI) and svi.steps_per_call > 1:
        svi.run(count, *args, **kwargs)
    else:
        for _ in range(count):
            svi.step(*args, **kwargs)
    if getattr(svi, "fallback_reason", None):
        raise RuntimeError(svi.fallback_reason)
    return (time.perf_counter() - start) / count * 1e3


# --- rounds ---


def measure(columns: dict[str, Column], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, with the seconds that building took, or why it failed."""
    result: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for name, column in columns.items():
        size = options.steps_per_call if name in ("several", "scan") else 1
        least = size if size > 1 else 3
        start = time.perf_counter()
        try:
            column(1 + size)  # the first step of a compiled one is eager
            result[f"{name} build"] = time.perf_counter() - start
            ms = column(least)
        except Exception as error:  # of Pyro's jit, which fails on many guides: the column says so
            result[f"{name} failed"] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        calls = min(round(options.seconds * 1e3 / ms / size), 500)
        counts[name] = max(size * calls, least)
    rounds = [{n: columns[n](count) for n, count in counts.items()} for _ in range(options.rounds)]
    for name in counts:
        result[name] = statistics.median(r[name] for r in rounds)
    ratios = [("SVI", name) for name in counts if name != "SVI"]
    for a, b in (*ratios, *RATIOS):
        if a in counts and b in counts:
            result[f"{a} / {b}"] = statistics.median(r[a] / r[b] for r in rounds)
    return result


def facts(options: argparse.Namespace, peer: NumPyro | None) -> dict[str, Any]:
    """What the times depend on."""
    versions = {m.__name__: m.__version__ for m in (torch, pyro, pyro_flows_ext, np)}
    return {
        "command": " ".join(["python", "benchmarks/svi.py", *sys.argv[1:]]),
        "threads": options.threads,
        "steps_per_call": options.steps_per_call,
        "rounds": options.rounds,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load at the start": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **versions},
        "versions of the other environment": peer.versions if peer else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "vae"], default=[*MODELS, "vae"])
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--particles", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--steps-per-call", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.25, help="of a column in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--numpyro", action="store_true", help="NumPyro's columns too")
    parser.add_argument("--numpyro-env", type=Path, default=DEFAULT)
    parser.add_argument("--output", type=Path, help="folder for svi.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    peer = NumPyro(options.numpyro_env, options.threads) if options.numpyro else None
    report: dict[str, Any] = facts(options, peer) | {"rows": []}
    for name in options.models:
        for guide_name in ["encoder"] if name == "vae" else options.guides:
            for particles in options.particles:
                row = measure_row(name, guide_name, particles, options, peer)
                report["rows"].append(row)
                print(show(row), flush=True)
                if options.output is not None:
                    options.output.mkdir(parents=True, exist_ok=True)
                    (options.output / "svi.json").write_text(json.dumps(report, indent=1))


def measure_row(
    name: str, guide_name: str, particles: int, options: argparse.Namespace, peer: NumPyro | None
) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    if name == "vae":
        (model, guide, args), kwargs = vae(), {}
    else:
        model, args, kwargs = MODELS[name]()
        guide = GUIDES[guide_name](model)
    row = {"model": name, "guide": guide_name, "particles": particles}
    size, failed = options.steps_per_call, {}
    columns = our_columns(model, guide, args, kwargs, particles, size)
    if peer is not None:
        try:
            columns |= peer.columns(row, args, kwargs, size)
        except RuntimeError as error:
            failed["numpyro failed"] = str(error)
    return row | measure(columns, options) | failed


def show(row: dict[str, Any]) -> str:
    label = f"{row['model']:9s} {row['guide']:12s} {row['particles']:3d}"
    parts = []
    for name in ("SVI", "jit", "eager", "compiled", "several", "numpyro", "unfetched", "scan"):
        if name in row:
            ratio = row.get(f"SVI / {name}")
            built = f" ({ratio:.1f}x; built in {row[f'{name} build']:.1f} s)" if ratio else ""
            parts.append(f"{name} {row[name]:.3f} ms{built}")
        elif f"{name} failed" in row:
            parts.append(f"{name} - ({row[f'{name} failed']})")
    return f"{label}  " + ", ".join(parts)


if __name__ == "__main__":
    main()
