"""Rows a second on one process and on two, at the same total batch: a Glow, an NSF and an amortized autoencoder.

    python benchmarks/processes.py

starts itself on one process and by `torchrun` on two, in turn, `--repeats` times each, with one thread a process. The number
of steps is chosen in the first run, so that a density trains for `--seconds` on one process, and is the same in all others. Prints
rows a second of the wall clock, CPU seconds a step of each process, and the last losses. It needs as many idle cores as
processes: the wall clock says nothing where other programs run. The defaults take about three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_flows_ext as pf

RANK, COUNT = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Clock:
    """Times of steps, on the wall and of this process; the first few, which load and allocate, are left out."""

    SKIPPED = 3

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def tick(self, _: object = None) -> None:
        self.ticks.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> list[float]:
        """Seconds a step: wall, CPU."""
        kept = self.ticks[self.SKIPPED :]
        return [(kept[-1][i] - kept[0][i]) / (len(kept) - 1) for i in (0, 1)]


def density(
    make: Callable[[], pf.FlowDistribution], batch: int, num_steps: int
) -> tuple[list[float], float]:
    """Seconds a step of `fit_density`, and the last loss."""
    torch.manual_seed(0)
    flow, clock = make(), Clock()
    rows = torch.randn(4 * batch, *flow.event_shape, generator=torch.Generator().manual_seed(1))
    result = pf.fit_density(
        flow,
        rows + 0.3 * rows.roll(1, 1).square(),
        batch_size=batch,
        num_steps=num_steps,
        validation=None,
        standardize=False,
        evaluate_every=1,
        callback=clock.tick,
        progress=False,
        seed=0,
    )
    return clock.seconds(), result.losses[-1].item()


def autoencoder(batch: int, num_steps: int) -> tuple[list[float], float]:
    """Seconds a step of `fit` with an amortized guide, and the mean of the last five losses in nats a datum."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    decoder = nn.Sequential(nn.Linear(32, 400), nn.Softplus(), nn.Linear(400, 784))
    encoder = nn.Sequential(nn.Linear(784, 400), nn.Softplus(), nn.Linear(400, 200))
    x = (torch.rand(4 * batch, 784, generator=torch.Generator().manual_seed(1)) < 0.2).float()
    clock = Clock()

    def model(x: Tensor, size: int) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(32), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[index])
            clock.tick()

    guide = pf.AutoAmortizedFlow(model, encoder, flow="iaf", num_layers=2)
    # Every process draws a mini-batch of its own.
    options = {"num_particles": 1, "compile": False, "progress": False, "seed": 0}
    result = pf.fit(model, guide, x, size=batch // COUNT, num_steps=num_steps, lr=1e-3, **options)
    # Setup and checks run the model before training, a bit more often than a step does.
    clock.ticks = clock.ticks[-num_steps:]
    return clock.seconds(), result.losses[-5:].mean().item() / len(x)


def _glow() -> pf.FlowDistribution:
    return pf.flows.Glow((3, 16, 16), num_layers=4, hidden_dims=(32, 32))


def _nsf() -> pf.FlowDistribution:
    return pf.flows.NSF(64, num_layers=3, hidden_dims=(128, 128))


# Name, batch of all processes together, and what takes some steps.
CASES: dict[str, tuple[int, Callable[[int], tuple[list[float], float]]]] = {
    "Glow 16 x 16 x 3": (512, partial(density, _glow, 512)),
    "NSF of 64 columns": (4096, partial(density, _nsf, 4096)),
    "autoencoder of 784 pixels": (4096, partial(autoencoder, 4096)),
}


def work(path: Path, seconds: float, steps: dict[str, int]) -> None:
    """All cases in this process; the first writes what came of them."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {}
    for name, (batch, train) in CASES.items():
        num = steps.get(name)
        if num is None:
            (wall, _), _ = train(8)
            num = max(10, round(seconds / wall))
        (wall, cpu), loss = train(num)
        found[name] = {"steps": num, "rows": batch / wall, "wall": wall, "cpu": cpu, "loss": loss}
    if RANK == 0:
        path.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.seconds, options.steps)
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs: dict[int, list[dict[str, dict[str, float]]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        for num in [1, 2] * options.repeats:
            known = {name: run["steps"] for name, run in runs[1][0].items()} if runs[1] else {}
            command = [sys.executable, *(launcher if num > 1 else []), __file__, "--work", path]
            command += ["--seconds", options.seconds, "--steps", json.dumps(known)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([str(part) for part in command], env=environment, check=True)
            runs[num].append(json.loads(path.read_text()))
            for name, run in runs[num][-1].items():
                print(
                    f"{num} process{'es' if num > 1 else ''}, {name}: {run['rows']:.0f} rows a second, {1e3 * run['wall']:.0f} ms of "
                    f"the clock and {1e3 * run['cpu']:.0f} ms of a core a step, loss {run['loss']:.5f} after {run['steps']}",
                    flush=True,
                )
    for name in CASES:
        rates = [statistics.median(run[name]["rows"] for run in runs[num]) for num in (1, 2)]
        print(f"{name}: {rates[1] / rates[0]:.2f} times the rows a second")


if __name__ == "__main__":
    main()
