"""Maximum likelihood on two moons, with layers whose inverse has no closed form.

    python benchmarks/two_moons.py --output out

trains `TransformedDistribution(base, layers).log_prob(x)` on data the layers never drew, prints the log-likelihood of
held-out data (nats) and the integral of the density on a grid, and draws both densities.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows_ext.transforms import ElementwiseAffine, planar, sylvester

FLOWS = {
    "16 planar": lambda: [planar(2) for _ in range(16)],
    "4 Sylvester": lambda: [sylvester(2) for _ in range(4)],
}


def two_moons(num: int, noise: float = 0.1) -> Tensor:
    """Two interleaved half circles with normal noise, `(num, 2)`, centred."""
    angle = torch.rand(num) * torch.pi
    arc = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.rand(num, 1) < 0.5
    moons = torch.where(lower, torch.tensor([1.0, 0.5]) - arc, arc)
    return moons + noise * torch.randn(num, 2) - torch.tensor([0.5, 0.25])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train, test = two_moons(10_000), two_moons(10_000)
    axis = torch.linspace(-4, 4, 401)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    cell = (axis[1] - axis[0]).item() ** 2
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    panels = {"data": torch.histogramdd(train, 100, range=[-2.2, 2.2, -1.6, 1.6]).hist.mT}
    for name, make in FLOWS.items():
        layers = [*make(), ElementwiseAffine(2)]
        flow = dist.TransformedDistribution(base, layers)
        parameters = [p for layer in layers for p in layer.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        start = time.perf_counter()
        for _ in range(options.steps):
            loss = -flow.log_prob(train[torch.randint(len(train), (500,))]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            log_likelihood = flow.log_prob(test).mean().item()
            density = flow.log_prob(grid.reshape(-1, 2)).exp().reshape(len(axis), -1)
        integral = density.sum().item() * cell
        print(
            f"{name:12s} test log-likelihood {log_likelihood:.3f} nats, "
            f"integral {integral:.4f}, {seconds:.0f} s",
            flush=True,
        )
        panels[name] = density[120:281, 90:311]  # [-2.2, 2.2] x [-1.6, 1.6]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for ax, (title, image) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        ax.imshow(image, origin="lower", extent=(-2.2, 2.2, -1.6, 1.6), cmap="magma")
        ax.set(title=title, xticks=[], yticks=[])
    figure.savefig(options.output / "two_moons.png", dpi=150)


if __name__ == "__main__":
    main()
