"""Memory and speed of `fit_density` on rows of a memory-mapped file.

    python benchmarks/memory_map.py --folder /var/tmp

writes a file of 10⁶ rows of 20 float32 numbers to the folder, if it is not there, trains NSF(20) on it, and prints rows a second and the peak of resident
memory beyond that of a process that has imported the package and trained for two steps. Linux counts the pages of the mapped file that are
in memory as resident; they are printed apart.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import pyro_flows_ext as pf

CHUNK = 100_000


def make(path: Path, num_rows: int, dim: int) -> None:
    """Rows of correlated, skewed columns, written in chunks."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(dim, dim)) / dim**0.5
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_rows, dim))
    for start in range(0, num_rows, CHUNK):
        part = rows[start : start + CHUNK]
        z = rng.normal(size=part.shape) @ mixing
        part[:] = z + 0.3 * np.square(np.roll(z, 1, 1))
    rows.flush()


def status(name: str) -> float:
    """A line of the process's status, such as VmHWM, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def reset_peak() -> None:
    """Makes VmHWM the memory of now."""
    Path("/proc/self/clear_refs").write_text("5")


def train(path: Path, steps: int, batch: int, validation: float) -> None:
    """Trains in this process, and prints what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = np.load(path, mmap_mode="r")
    flow = pf.flows.NSF(rows.shape[1])
    options = {"batch_size": batch, "progress": False, "seed": 0}
    # Everything that a first step loads.
    pf.fit_density(flow, np.array(rows[:1000]), num_steps=2, **options)
    reset_peak()
    before = status("VmHWM")
    ticks: list[float] = []
    begin, cpu = time.perf_counter(), time.process_time()
    result = pf.fit_density(
        flow,
        rows,
        validation=validation,
        num_steps=steps,
        evaluate_every=steps // 2,
        callback=lambda _: ticks.append(time.process_time()),
        **options,
    )
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak, mapped = status("VmHWM"), status("RssFile")
    # From the evaluation in the middle to the one at the end: half of the steps, and one pass over the validation rows.
    num_trained, num_validated = steps // 2 * batch, round(validation * len(rows))
    print(
        f"{len(rows)} x {rows.shape[1]}, a file of {path.stat().st_size / 2**20:.0f} MiB: peak {peak - before:.0f} MiB over the "
        f"{before:.0f} of the process ({mapped:.0f} of files mapped at the end); {wall:.1f} s of the clock and {cpu:.1f} CPU s, of "
        f"which {ticks[-1] - ticks[-2]:.1f} for {num_trained} rows in batches of {batch} and {num_validated} validated; validation "
        f"{result.best_loss:.3f} nats",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--validation", type=float, default=0.02)
    options = parser.parse_args()
    path = options.folder / f"rows-{options.rows}-{options.dim}.npy"
    make(path, options.rows, options.dim)
    train(path, options.steps, options.batch, options.validation)


if __name__ == "__main__":
    main()
