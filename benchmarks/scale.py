"""Seconds and memory of a training step by dimension, depth and batch, and a law fitted to them.

    python benchmarks/scale.py

Trains NSF and RealNVP by Adam on every combination of `DIMS`, `DEPTHS` and `BATCHES` (two hidden layers of 64), and prints CPU
milliseconds a step, MiB that a step adds to the process at its peak, and parameters. Then fits by least
squares, in logarithms,

    milliseconds of a layer = c · batch^a · dim^b        (of the largest depth less the smallest)
    MiB of activations of a layer = c' · batch · dim      (likewise)

One thread. CPU time is that of the process, so that other programs matter less.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time

import numpy as np
import torch
from memory_map import reset_peak, status

import pyro_flows_ext as pf

M_MMAP_THRESHOLD = -3  # of malloc.h
DIMS, DEPTHS, BATCHES = (8, 32, 128), (2, 6), (256, 2048)
FLOWS = {"nsf": pf.flows.NSF, "realnvp": pf.flows.RealNVP}


def measure(name: str, dim: int, depth: int, repeats: int) -> list[dict[str, float]]:
    """A row for each batch."""
    torch.manual_seed(0)
    flow = FLOWS[name](dim, num_layers=depth, hidden_dims=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)

    def step(x: torch.Tensor) -> float:
        begin = time.process_time()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begin

    step(torch.randn(16, dim))
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, dim)
        reset_peak()
        before = status("VmHWM")
        step(x)
        added = status("VmHWM") - before
        seconds = statistics.median(step(x) for _ in range(repeats))
        num = sum(p.numel() for p in flow.parameters())
        rows.append({"flow": name, "dim": dim, "depth": depth, "batch": batch})
        rows[-1] |= {"ms": 1e3 * seconds, "mib": added, "parameters": num}
        print(json.dumps(rows[-1]), flush=True)
    return rows


def fit(found: list[dict[str, float]]) -> None:
    """The laws, from the difference of the two depths."""
    by_key = {(r["flow"], r["dim"], r["depth"], r["batch"]): r for r in found}
    few, many = min(DEPTHS), max(DEPTHS)
    for name in FLOWS:
        cells = []
        for dim in DIMS:
            for batch in BATCHES:
                a, b = by_key[name, dim, few, batch], by_key[name, dim, many, batch]
                ms, mib = ((b[key] - a[key]) / (many - few) for key in ("ms", "mib"))
                cells.append((dim, batch, ms, mib))
        dims, batches, ms, mib = np.array(cells).T
        design = np.stack([np.ones(len(cells)), np.log(batches), np.log(dims)], 1)
        law, *_ = np.linalg.lstsq(design, np.log(ms), rcond=None)
        off = np.exp(np.abs(np.log(ms) - design @ law).max())
        numbers = batches * dims
        memory = (mib * numbers).sum() / (numbers**2).sum()
        print(
            f"{name}: {np.exp(law[0]):.2g} ms · batch^{law[1]:.2f} · dim^{law[2]:.2f} a layer, within a factor of {off:.2f}; "
            f"{memory * 2**20:.0f} bytes a layer, row and column"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Memory that is freed goes back to the system at once, so that the peak is that of live tensors.
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 65_536)
    found = []
    for name in FLOWS:
        for dim in DIMS:
            for depth in DEPTHS:
                found += measure(name, dim, depth, options.repeats)
    fit(found)


if __name__ == "__main__":
    main()
