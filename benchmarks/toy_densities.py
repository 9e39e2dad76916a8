"""Continuously indexed flows against deep ones, on data of the plane (Cornish et al. 2020).

    python benchmarks/toy_densities.py --seeds 3 --output benchmark-output
    python benchmarks/toy_densities.py --toys checkerboard --steps 1000

A continuously indexed masked autoregressive flow of 5 layers beside a plain one of 20: MADE with four hidden layers of 50,
s and t of two of 10, p and q of four of 50, u of one number, Adam by a cosine, batches of fresh points (1000 in the
paper). `--train-particles 5` trains the indexed flow by the weighted bound instead of the ELBO.
Printed: negative log-likelihood in nats of 10,000 test points, by the importance-weighted bound with 100 particles for the
indexed flow (an upper bound, then), beside the entropy of the data, which no density beats. Writes toy_densities.json and .png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_flows_ext.distributions import TOYS, ContinuouslyIndexedFlow, FlowDistribution
from pyro_flows_ext.distributions.base import Density
from pyro_flows_ext.transforms import maf

FLOWS = ("MAF-20", "CIF-MAF-5")
HIDDEN = [50] * 4
NUM_TEST, NUM_PARTICLES, CHUNK = 10_000, 100, 10


def make(name: str) -> Density:
    """The flow of 5 indexed layers, or the one of 20 plain ones."""
    base = dist.Normal(torch.zeros(2), 1.0)
    if name == "MAF-20":
        return FlowDistribution(base, maf(2, num_layers=20, hidden_dims=HIDDEN))
    layers = maf(2, num_layers=5, hidden_dims=HIDDEN)
    return ContinuouslyIndexedFlow(base, layers, 1, (10, 10), (50,) * 4)


def train(
    density: Density, toy: Any, steps: int, lr: float, batch: int, num_particles: int
) -> None:
    """Maximises the log-density, or the bound with these particles, of fresh points."""
    params = list(density.parameters())
    optimizer = torch.optim.Adam(params, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        points = toy.sample(batch)
        if isinstance(density, ContinuouslyIndexedFlow):
            values = density.log_prob_bound(points, num_particles)
        else:
            values = density.log_prob(points)
        (-values.mean()).backward()
        if torch.nn.utils.clip_grad_norm_(params, 10.0).isfinite():
            optimizer.step()
        schedule.step()


@torch.no_grad()
def test(density: Density, points: Tensor) -> tuple[float, float]:
    """Mean negative log-likelihood, or its bound, and its standard error."""
    if isinstance(density, ContinuouslyIndexedFlow):
        parts = [density.log_prob_bound(p, NUM_PARTICLES, CHUNK) for p in points.split(2000)]
        values = torch.cat(parts)
    else:
        values = density.log_prob(points)
    return -values.mean().item(), values.std().item() / len(points) ** 0.5


def draw(figure: Figure, panels: list[tuple[str, Tensor]], row: int, num_rows: int) -> None:
    """One row of pictures: points of the data, then of each flow."""
    low, high = panels[0][1].quantile(torch.tensor([0.001, 0.999]), dim=0)
    margin = 0.15 * (high - low)
    for i, (title, points) in enumerate(panels):
        axes = figure.add_subplot(num_rows, len(panels), row * len(panels) + i + 1)
        box = [[(low - margin)[k].item(), (high + margin)[k].item()] for k in (0, 1)]
        axes.hist2d(*points.T.numpy(), bins=100, range=box, cmap="magma")
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ["two-uniforms", "checkerboard", "annulus", "split-gaussian", "eight-gaussians"]
    parser.add_argument("--toys", nargs="+", choices=TOYS, default=default)
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--train-particles", type=int, default=1, help="of the indexed flow's bound in training"
    )
    parser.add_argument("--output", type=Path, help="folder for toy_densities.json and .png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    figure = Figure(figsize=(7, 2.4 * len(options.toys)), layout="constrained")
    for line, name in enumerate(options.toys):
        toy, panels = TOYS[name], []
        for flow in options.flows:
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                torch.manual_seed(seed)
                density = make(flow)
                start = time.process_time()
                train(
                    density, toy, options.steps, options.lr, options.batch, options.train_particles
                )
                seconds = time.process_time() - start
                torch.manual_seed(10_000 + seed)
                nll, se = test(density, toy.sample(NUM_TEST))
                rows.append({"toy": name, "flow": flow, "seed": seed, "nll": nll, "se": se, "entropy": toy.entropy, "seconds": seconds})  # fmt: skip
                print(f"{name:16s} {flow:10s} {seed}  NLL {nll:.3f} ± {se:.3f}  entropy {toy.entropy:.3f}  {seconds:.0f} s", flush=True)  # fmt: skip
                if seed == options.first_seed:
                    panels.append((f"{flow}: {nll:.2f} nats", density.sample((50_000,))))
            if options.output:
                options.output.mkdir(parents=True, exist_ok=True)
                path = options.output / "toy_densities.json"
                path.write_text(json.dumps(rows, indent=1))
        points = toy.sample(50_000)
        draw(figure, [(f"{name}: {toy.entropy:.2f} nats", points), *panels], line, len(options.toys))  # fmt: skip
        if options.output:
            figure.savefig(options.output / "toy_densities.png", dpi=110)


if __name__ == "__main__":
    main()
