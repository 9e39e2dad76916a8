"""Rows a second of `fit_density` on one process and on several.

    python benchmarks/processes.py
    torchrun --standalone --nproc-per-node 2 benchmarks/processes.py

NSF on 64 columns, batches of 2048 rows of all processes together, one thread a process. Prints wall and CPU seconds a
step of every process: the wall clock says what a run takes, and CPU seconds what it would take on cores of its own, but for
waiting.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

import pyro_flows_ext as pf

DIM, BATCH = 64, 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = torch.randn(20_000, DIM, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    flow = pf.flows.NSF(DIM, num_layers=3, hidden_dims=(128, 128))
    common = {"batch_size": BATCH, "validation": None, "standardize": False, "progress": False}
    pf.fit_density(flow, rows, num_steps=3, seed=0, **common)
    wall, cpu = time.perf_counter(), time.process_time()
    result = pf.fit_density(flow, rows, num_steps=options.steps, seed=0, **common)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}: "
        f"{BATCH * options.steps / wall:.0f} rows a second, {1e3 * wall / options.steps:.0f} ms of the clock and "
        f"{1e3 * cpu / options.steps:.0f} ms of a core a step, last loss {result.losses[-1]:.6f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
