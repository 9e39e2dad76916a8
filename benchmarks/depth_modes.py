"""How many couplings do k modes on a sphere take? (Koehler, Mehta & Risteski 2021: lower bounds on depth.)

k normals of sd .2 at random points of the unit sphere times 2, in four dimensions, equally likely: a target whose density is known, so
that KL(p ‖ q) is a mean over draws. RealNVP of n couplings, halves in turn, by maximum likelihood.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pyro.distributions as dist
import torch
from depth_training import COLORS, log_prob, maximum_likelihood

from pyro_flows_ext.transforms import realnvp

DIM, RADIUS, SD = 4, 2.0, 0.2
DEPTHS = (1, 2, 4, 8)
MODES = (4, 16)


def modes(k: int, seed: int) -> dist.TorchDistribution:
    """k normals on the sphere."""
    points = torch.randn(k, DIM, generator=torch.Generator().manual_seed(seed))
    loc = RADIUS * points / points.norm(dim=-1, keepdim=True)
    return dist.MixtureSameFamily(
        dist.Categorical(torch.full((k,), 1 / k)), dist.Normal(loc, SD).to_event(1)
    )


def run(seeds: int, quick: bool) -> list[dict]:
    """One row for each k, depth and seed; prints medians over seeds."""
    steps, rows = 60 if quick else 300, []
    for k in MODES:
        for depth in DEPTHS:
            start = time.process_time()
            for seed in range(seeds):
                p = modes(k, seed)
                torch.manual_seed(seed)
                flow = realnvp(DIM, num_layers=depth, hidden_dims=(64, 64))
                maximum_likelihood(flow, lambda n, p=p: p.sample((n,)), steps)
                x = p.sample((5000,))
                with torch.no_grad():
                    gap = p.log_prob(x) - log_prob(flow, x)
                rows.append({"k": k, "couplings": depth, "seed": seed, "kl": gap.mean().item(), "se": gap.std().item() / len(x) ** 0.5})  # fmt: skip
            kl = statistics.median(r["kl"] for r in rows if (r["k"], r["couplings"]) == (k, depth))
            seconds = (time.process_time() - start) / seeds
            print(f"k = {k:<3} {depth} couplings   KL {kl:.3f} nats   {seconds:.0f} s", flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """KL against the number of couplings, a line for each k."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.8), layout="constrained")
    ax = figure.subplots()
    for k, color in zip(MODES, COLORS, strict=False):
        values = [statistics.median(r["kl"] for r in rows if (r["k"], r["couplings"]) == (k, n)) for n in DEPTHS]  # fmt: skip
        ax.plot(DEPTHS, values, "o-", color=color, markersize=3, label=f"{k} modes")
    ax.set(xscale="log", ylim=(0, None), xlabel="couplings", ylabel="KL (nats)")
    ax.set_xticks(DEPTHS, [str(n) for n in DEPTHS])
    ax.minorticks_off()
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
