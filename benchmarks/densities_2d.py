"""Maximum likelihood on data with holes and separate parts: autoregressive flows, plain and continuously indexed.

    python benchmarks/densities_2d.py --output out

trains a masked autoregressive flow of 5 and of 20 layers and a continuously indexed one of 5 on `TOYS`, and prints how far
the negative log-likelihood of held-out data is above the entropy: KL(data ‖ density) in nats, for the indexed flow an
upper bound of it with 100 particles. Draws the data and the draws of each.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_flows_ext.distributions import TOYS, ContinuouslyIndexedFlow, Density, FlowDistribution
from pyro_flows_ext.transforms import maf

WIDE = (50, 50, 50, 50)


def base() -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)


def plain(num_layers: int) -> Density:
    return FlowDistribution(base(), maf(2, num_transforms=num_layers, hidden_dims=WIDE))


def indexed(num_layers: int) -> Density:
    parts = maf(2, num_transforms=num_layers, hidden_dims=WIDE)
    return ContinuouslyIndexedFlow(base(), parts, 1, (10, 10), WIDE)


FLOWS = {
    "MAF, 5 layers": lambda: plain(5),
    "MAF, 20 layers": lambda: plain(20),
    "indexed MAF, 5 layers": lambda: indexed(5),
}


def train(density: Density, name: str, steps: int, batch: int, lr: float) -> float:
    """Seconds that it took."""

    def model(x: Tensor) -> None:
        pyro.module("density", density)
        with pyro.plate("data", len(x)):
            pyro.sample("x", density, obs=x)

    pyro.clear_param_store()
    scheduler = pyro.optim.CosineAnnealingLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": steps},
        {"clip_norm": 5.0},
    )
    svi = SVI(model, lambda x: None, scheduler, Trace_ELBO())
    start = time.perf_counter()
    for _ in range(steps):
        svi.step(TOYS[name].sample(batch) / scale(name))
        scheduler.step()
    return time.perf_counter() - start


def scale(name: str) -> float:
    """Of the data, by which they are divided before a flow sees them."""
    generator = torch.Generator().manual_seed(0)
    return TOYS[name].sample(10_000, generator=generator).std().item()


@torch.no_grad()
def score(density: Density, x: Tensor) -> Tensor:
    if density.exact_log_prob:
        return density.log_prob(x)  # type: ignore[no-any-return]
    return torch.cat([density.log_prob_bound(rows, 100) for rows in x.split(1000)])  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--toys",
        nargs="+",
        default=["two-uniforms", "checkerboard", "eight-gaussians"],
        choices=TOYS,
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results, pictures = [], {}
    for name in options.toys:
        toy, factor = TOYS[name], scale(name)
        pictures[name, "data"] = toy.sample(20_000)
        for title, make in FLOWS.items():
            torch.manual_seed(0)
            density = make()
            seconds = train(density, name, options.steps, options.batch, options.lr)
            values = score(density, toy.sample(10_000) / factor) - 2 * torch.tensor(factor).log()
            gap = -values.mean().item() - toy.entropy
            error = (values.std() / len(values) ** 0.5).item()
            pictures[name, title] = density.sample(torch.Size((20_000,))) * factor
            size = sum(p.numel() for p in density.parameters())
            results.append(
                {
                    "data": name,
                    "flow": title,
                    "kl": gap,
                    "se": error,
                    "parameters": size,
                    "seconds": seconds,
                }
            )
            print(
                f"{name:16} {title:22} KL {gap:6.3f} ± {error:.3f}  {size:6} parameters {seconds:5.0f} s",
                flush=True,
            )
    (options.output / "densities_2d.json").write_text(json.dumps(results, indent=1))
    draw(pictures, options.toys, options.output / "densities_2d.png")


def draw(pictures: dict[tuple[str, str], Tensor], toys: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = ["data", *FLOWS]
    figure, axes = plt.subplots(
        len(toys), len(columns), figsize=(2.6 * len(columns), 2.7 * len(toys)), squeeze=False
    )
    for row, name in zip(axes, toys, strict=True):
        limit = 1.15 * pictures[name, "data"].abs().max().item()
        for ax, title in zip(row, columns, strict=True):
            x = pictures[name, title].clamp(-limit, limit)
            ax.hist2d(*x.T.numpy(), bins=120, range=[[-limit, limit]] * 2, cmap="magma")
            ax.set(xticks=[], yticks=[], aspect="equal")
            if row is axes[0]:
                ax.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
