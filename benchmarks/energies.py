"""Planar flows on the test energies of Rezende & Mohamed (2015, table 1 and figure 3).

    python benchmarks/energies.py --energy u1 --num-layers 2 8 16 --seeds 3 --output out

trains q(z) = flow(N(m, s²)) by the annealed free energy E_q[log q(z) + β U(z)] (their eq. 20), prints KL(q ‖ p) in
nats against the known log Z, and draws every density beside the energy.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import pyro.distributions as dist
import torch

from pyro_flows_ext.distributions.energies import ENERGIES
from pyro_flows_ext.transforms import ComposeFlow, ElementwiseAffine, planar


def train(energy, num_layers, steps, seed, batch=500, lr=5e-3):
    """A planar flow of `num_layers` layers on `energy`, and its KL from 100,000 fresh draws."""
    torch.manual_seed(seed)
    parts = [ElementwiseAffine(2)]
    if num_layers:
        parts.append(planar(2, num_layers=num_layers))
    flow = ComposeFlow(parts)
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    q = dist.TransformedDistribution(base, [flow])
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for step in range(steps):
        beta = min(1.0, 0.01 + 0.99 * step / (0.4 * steps))
        z = q.rsample((batch,))
        loss = (q.log_prob(z) + beta * energy.function(z)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        z = q.sample((100_000,))
        terms = q.log_prob(z) + energy.function(z) + energy.log_z
    return q, terms.mean().item(), (terms.std() / math.sqrt(len(terms))).item(), seconds


def draw(energy, densities, path):
    """The energy's density and the flows' beside it, on [-4, 4]²."""
    from matplotlib.figure import Figure

    axis = torch.linspace(-4, 4, 300)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    panels = {"exp(-U) / Z": (-energy.function(grid) - energy.log_z).exp()}
    with torch.no_grad():
        for title, q in densities.items():
            panels[title] = q.log_prob(grid.reshape(-1, 2)).exp().reshape(300, 300)
    figure = Figure(figsize=(3 * len(panels), 3.2), layout="constrained")
    for ax, (title, density) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        ax.imshow(density, origin="lower", extent=(-4, 4, -4, 4), cmap="magma")
        ax.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--energy", choices=sorted(ENERGIES), default="u1")
    parser.add_argument("--num-layers", type=int, nargs="+", default=[0, 2, 8, 16])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    energy = ENERGIES[options.energy]
    rows, best = [], {}
    for num_layers in options.num_layers:
        runs = [train(energy, num_layers, options.steps, seed) for seed in range(options.seeds)]
        kls = [kl for _, kl, _, _ in runs]
        best[f"K = {num_layers}"] = min(runs, key=lambda run: run[1])[0]
        seconds = statistics.median(run[3] for run in runs)
        rows.append({"K": num_layers, "kl": kls, "se": runs[0][2], "seconds": seconds})
        shown = ", ".join(f"{kl:.3f}" for kl in kls)
        print(f"{options.energy} K={num_layers:<3} KL {shown} nats  {seconds:.0f} s", flush=True)
    (options.output / f"{options.energy}.json").write_text(json.dumps(rows, indent=2))
    draw(energy, best, options.output / f"{options.energy}.png")


if __name__ == "__main__":
    main()
