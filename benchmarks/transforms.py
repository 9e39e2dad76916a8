"""Side-by-side timings of transforms against Pyro's own, in one run.

    python benchmarks/transforms.py --output benchmark-output

times `rsample`, `log_prob` of the sample, and the gradient of both in every parameter, eagerly, at D = 64 and a batch
of 1024. All candidates are run in turn, many times over, so that a busy machine slows all of them alike; medians are
compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as stock

from pyro_flows_ext.transforms import planar, sylvester

DIM, BATCH, LAYERS = 64, 1024, 16

# name -> (transforms, the candidate it is compared with)
CANDIDATES: dict[str, tuple[Callable[[], list], str | None]] = {
    "pyro planar x16": (lambda: [stock.planar(DIM) for _ in range(LAYERS)], None),
    "planar x16": (lambda: [planar(DIM) for _ in range(LAYERS)], "pyro planar x16"),
    "planar stack of 16": (lambda: [planar(DIM, num_transforms=LAYERS)], "pyro planar x16"),
    "pyro sylvester x16": (lambda: [stock.sylvester(DIM) for _ in range(LAYERS)], None),
    "sylvester x16": (lambda: [sylvester(DIM) for _ in range(LAYERS)], "pyro sylvester x16"),
    "sylvester stack of 16": (
        lambda: [sylvester(DIM, num_transforms=LAYERS)],
        "pyro sylvester x16",
    ),
    "sylvester rank 8 x16": (
        lambda: [sylvester(DIM, rank=8) for _ in range(LAYERS)],
        "pyro sylvester x16",
    ),
    "sylvester rank 8 stack of 16": (
        lambda: [sylvester(DIM, rank=8, num_transforms=LAYERS)],
        "pyro sylvester x16",
    ),
}


def step(transforms: list) -> Callable[[], None]:
    """One `rsample`, `log_prob` and gradient."""
    base = dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)
    flow = dist.TransformedDistribution(base, transforms)
    parameters = [p for t in transforms for p in t.parameters()]

    def run() -> None:
        z = flow.rsample((BATCH,))
        (flow.log_prob(z).mean() - z.square().mean()).backward()
        for p in parameters:
            p.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    runs = {name: step(make()) for name, (make, _) in CANDIDATES.items()}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t) for name, t in times.items()}
    rows = []
    for name, (_, peer) in CANDIDATES.items():
        # The median of the ratios within each round: both ran within a second of each other.
        ratio = (
            statistics.median(a / b for a, b in zip(times[peer], times[name], strict=True))
            if peer
            else None
        )
        rows.append({"candidate": name, "ms": 1e3 * medians[name], "times faster": ratio})
        print(f"{name:30s} {1e3 * medians[name]:8.2f} ms" + (f"  {ratio:5.2f}x" if ratio else ""))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "transforms.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
