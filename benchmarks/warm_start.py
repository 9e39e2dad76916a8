"""The warm start on every reference posterior: CPU seconds, ELBO, winner and modes.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/warm_start.py --seeds 3

The ELBO is that of 1000 fresh draws. Run it with one thread (OMP_NUM_THREADS=1): other threads count as CPU seconds too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from targets import TARGETS, Target, load

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import warm_start

NUM_DRAWS = 1000


def run(target: Target, seed: int) -> dict[str, Any]:
    """One warm start, setting the guide up not included."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoIAF(target.model)
    guide.setup(*target.args)
    begin = time.process_time()
    found = warm_start(target.model, guide, *target.args)
    seconds = time.process_time() - begin
    torch.manual_seed(1234)
    noise = torch.randn(NUM_DRAWS, target.dim, dtype=found.gaussian.loc.dtype)
    return {
        "target": target.name,
        "dim": target.dim,
        "seed": seed,
        "cpu_seconds": seconds,
        "elbo": found.gaussian.elbo(target.log_density, noise),
        "winner": found.name,
        "elbos": found.elbos,
        "modes": [(mode.log_joint, mode.log_mass, mode.num_climbs) for mode in found.modes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file for all rows")
    options = parser.parse_args()
    rows = []
    print(f"{'posterior':44}{'D':>4}{'CPU s':>8}{'ELBO':>13}  winner (modes)")
    for name in options.targets:
        target = load(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [run(target, seed) for seed in range(options.seeds)]
        rows += found
        for row in found:
            print(
                f"{name:44}{row['dim']:4}{row['cpu_seconds']:8.2f}{row['elbo']:13.3f}  "
                f"{row['winner']} ({len(row['modes'])})",
                flush=True,
            )
    seconds = [row["cpu_seconds"] for row in rows]
    print(f"median {statistics.median(seconds):.2f} CPU s, most {max(seconds):.2f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
