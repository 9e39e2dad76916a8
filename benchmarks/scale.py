"""Seconds and memory of a training step by dimension, depth and batch, and a law fitted to them.

    python benchmarks/scale.py

Trains NSF and RealNVP by Adam on every combination of `DIMS`, `DEPTHS` and `BATCHES` (two hidden layers of 64), and prints CPU
milliseconds a step, MiB that a step adds to the process at its peak, and parameters. Then fits by
least squares, from the difference between the two depths,

    milliseconds of a layer = c0 + c1 · batch + c2 · batch · dim
    bytes of activations of a layer and row = m0 + m1 · dim

One thread. CPU time is that of the process, the least of `--repeats`, so that other programs matter less.
"""

from __future__ import annotations

import argparse
import ctypes
import json
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
        seconds = min(step(x) for _ in range(repeats))
        num = sum(p.numel() for p in flow.parameters())
        rows.append({"flow": name, "dim": dim, "depth": depth, "batch": batch})
        rows[-1] |= {"ms": 1e3 * seconds, "mib": added, "parameters": num}
        print(json.dumps(rows[-1]), flush=True)
    return rows


def fit(found: list[dict[str, float]]) -> None:
    """The laws, from the difference of the two depths."""
    by_key = {(r["flow"], r["dim"], r["depth"], r["batch"]): r for r in found}
    few, many = min(DEPTHS), max(DEPTHS)

    def a_layer(name: str, key: str, dim: int, batch: int) -> float:
        less, more = (by_key[name, dim, depth, batch][key] for depth in (few, many))
        return (more - less) / (many - few)

    for name in FLOWS:
        cells = [(dim, batch) for dim in DIMS for batch in BATCHES]
        ms = np.array([a_layer(name, "ms", *cell) for cell in cells])
        design = np.array([[1.0, batch / 1e3, batch * dim / 1e6] for dim, batch in cells])
        # Relative errors: the largest cell takes a hundred times as long as the smallest.
        law, *_ = np.linalg.lstsq(design / ms[:, None], np.ones(len(ms)), rcond=None)
        off = np.abs(design @ law / ms - 1).max()
        # Small tensors come from memory that was freed before, and do not show.
        rows = max(BATCHES)
        size = np.array([a_layer(name, "mib", dim, rows) * 2**20 / rows for dim in DIMS])
        memory, *_ = np.linalg.lstsq(np.array([[1.0, dim] for dim in DIMS]), size, rcond=None)
        print(
            f"{name}: {law[0]:.2f} ms + {law[1]:.2f} ms · batch / 10³ + {law[2]:.1f} ms · batch · dim / 10⁶ a layer, within "
            f"{off:.0%}; {memory[0]:.0f} + {memory[1]:.0f} · dim bytes a layer and row"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
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
