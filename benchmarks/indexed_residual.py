"""Residual flows with an index and without, at equal training time (Cornish et al. 2020; Cornish 2021).

    python benchmarks/indexed_residual.py plane --toy two-uniforms --seconds 60 --output benchmark-output
    python benchmarks/indexed_residual.py images --arms small deep indexed --seconds 300

plane: ten residual layers over a Gaussian, and the same with an index of one number a layer. Printed: negative log-likelihood in
nats of fresh points, by the importance-weighted bound for the indexed flow, beside the entropy of the data; and the largest
slopes of the map from base to data and of its inverse, at the indices of each point. Writes indexed_plane.json and .png.

images: Fashion-MNIST, means of 2 x 2 pixels rounded to 256 levels, 14 x 14, or with `--data cifar` CIFAR-10 at 16 x 16,
read from `images/` in the folder named by PYRO_FLOWS_DATA.
Residual convolutional layers, each with an ActNorm, behind a squeeze: `small`; `deep`, twice the layers and widths, with more
parameters than the rest; `indexed`, as small with an index of
two channels. Printed: bits by dimension of test images. Log-dets are unbiased estimates, also at the test: their noise
cancels in the mean of `bits`, and raises the importance-weighted bound, which is given beside it.

Training stops after the given seconds of CPU time, with a rate that falls by a cosine of the time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factoring
import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_flows_ext.distributions import (
    TOYS,
    ContinuouslyIndexedFlow,
    Dequantized,
    FlowDistribution,
)
from pyro_flows_ext.distributions.base import Density
from pyro_flows_ext.distributions.normal import draw_by
from pyro_flows_ext.flows import CIF
from pyro_flows_ext.flows.images import image_layers
from pyro_flows_ext.transforms import ResidualFlow

NUM_LAYERS = 10


def train(density: Density, batch: Callable[[], Tensor], seconds: float, lr: float) -> int:
    """Adam on `log_prob` for so many seconds of CPU time: the number of steps."""
    density.train()
    optimizer = torch.optim.Adam(density.parameters(), lr=lr)
    start, steps = time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.zero_grad()
        (-density.log_prob(batch()).mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(density.parameters(), 20.0)
        if norm.isfinite():
            optimizer.step()
        steps += 1
    density.eval()
    return steps


def count(density: Density) -> int:
    return sum(p.numel() for p in density.parameters())


# --- the plane ---


def on_plane(name: str) -> Density:
    """Log-dets are exact: in two dimensions that is the cheaper way."""
    layers = [ResidualFlow(2, (32, 32), exact_log_det=True).inv for _ in range(NUM_LAYERS)]
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    if name == "residual":
        return FlowDistribution(base, layers)
    return ContinuouslyIndexedFlow(base, layers, 1, (10, 10), (50, 50))


def slopes(density: Density, points: Tensor) -> tuple[float, float]:
    """The largest slope of the map from base to data, and of its inverse, at the points and one index of each."""
    x = z = points.clone().requires_grad_()
    if isinstance(density, ContinuouslyIndexedFlow):
        for layer in list(density.layers)[::-1]:
            a = layer.indexed.transform.inverse_and_ladj(z)[0]
            u = draw_by(layer.reverse_net(a)).detach()
            z = layer.indexed.condition(u)[0].inverse_and_ladj(a)[0]
    else:
        z = density.transform.inverse_and_ladj(z)[0]  # type: ignore[union-attr, operator]
    rows = [torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)[0] for k in (0, 1)]
    sigma = torch.linalg.svdvals(torch.stack(rows, 1))
    return (1 / sigma[:, 1].min()).item(), sigma[:, 0].max().item()


def plane(options: Any) -> list[dict[str, Any]]:
    toy, rows, panels = TOYS[options.toy], [], []
    for name in options.arms or ("residual", "indexed"):
        torch.manual_seed(options.seed)
        density = on_plane(name)
        steps = train(density, lambda: toy.sample(options.batch), options.seconds, options.lr)
        torch.manual_seed(options.seed + 1)
        points = toy.sample(options.num_test)
        with torch.no_grad():
            if density.exact_log_prob:
                values = density.log_prob(points)
            else:
                values = density.log_prob_bound(points, options.particles, 10)  # type: ignore[operator]
            drawn = density.sample((10_000,))
        up, down = slopes(density, points)
        row = {"study": "plane", "toy": options.toy, "arm": name, "seed": options.seed, "nll": -values.mean().item(), "se": values.std().item() / len(values) ** 0.5, "entropy": toy.entropy, "lipschitz": up, "lipschitz of inverse": down, "steps": steps, "seconds": options.seconds, "parameters": count(density)}  # fmt: skip
        rows.append(row)
        print(f"{options.toy} {name:9s} NLL {row['nll']:.3f} ± {row['se']:.3f} (entropy {toy.entropy:.3f})   Lipschitz f {up:.3g}, f⁻¹ {down:.3g}   {steps} steps, {count(density)} parameters", flush=True)  # fmt: skip
        panels.append((f"{name}: {row['nll']:.2f} nats", drawn))
    if options.output:
        draw([(f"data: {toy.entropy:.2f} nats", toy.sample(10_000)), *panels]).savefig(
            options.output / f"indexed_plane_{options.toy}.png", dpi=110
        )
    return rows


def draw(panels: list[tuple[str, Tensor]]) -> Figure:
    figure = Figure(figsize=(2.6 * len(panels), 2.8), layout="constrained")
    low, high = panels[0][1].quantile(torch.tensor([0.001, 0.999]), dim=0)
    margin = 0.2 * (high - low)
    box = [[(low - margin)[k].item(), (high + margin)[k].item()] for k in (0, 1)]
    for ax, (title, points) in zip(
        figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True
    ):
        ax.hist2d(*points.T.numpy(), bins=90, range=box, cmap="magma")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=[], yticks=[])
    return figure


# --- images ---


def load() -> tuple[Tensor, Tensor]:
    """Training and test images `(N, 1, 14, 14)` of whole numbers up to 255."""
    root = os.environ.get("PYRO_FLOWS_DATA")
    if not root or not (Path(root) / "images" / "fashion_mnist.npz").is_file():
        raise SystemExit(
            f"set PYRO_FLOWS_DATA to the folder that holds images/fashion_mnist.npz (now: {root!r})"
        )
    with np.load(Path(root) / "images" / "fashion_mnist.npz", allow_pickle=False) as arrays:
        parts = [torch.as_tensor(arrays[k], dtype=torch.float32) for k in ("x_train", "x_test")]
    train, test = (torch.nn.functional.avg_pool2d(p[:, None], 2).round() for p in parts)
    return train, test


def of_images(name: str, shape: tuple[int, int, int], options: Any) -> Density:
    depth = options.depth * (2 if name == "deep" else 1)
    if name == "indexed":
        return CIF(shape, 0, depth, (32, 32), flow="residual", index_dim=2)
    widths = (64, 64) if name == "deep" else (32, 32)
    layers = image_layers(shape, "residual", depth, widths, 0)
    C, H, W = shape
    noise = dist.Normal(torch.zeros(4 * C, H // 2, W // 2), 1.0).to_event(3)
    return FlowDistribution(noise, layers)


def images(options: Any) -> list[dict[str, Any]]:
    data, test = load() if options.data == "fashion" else factoring.load("cifar")
    rows = []
    for name in options.arms or ("small", "deep", "indexed"):
        torch.manual_seed(options.seed)
        flow = of_images(name, tuple(data.shape[1:]), options)  # type: ignore[arg-type]
        density = Dequantized(flow)
        pixels = density.preprocess((data[:2000] + 0.5) / 256)  # type: ignore[misc]
        over = (0,) if options.by_pixel else (0, 2, 3)
        loc, scale = pixels.mean(over), pixels.std(over)
        if not options.by_pixel:
            loc, scale = loc[:, None, None], scale[:, None, None]
        flow.standardize(loc, scale)
        steps = train(
            density,
            lambda: data[torch.randint(len(data), (options.batch,))],
            options.seconds,
            options.lr,
        )
        torch.manual_seed(options.seed + 1)
        with torch.no_grad():
            # Twice, as the noise of the log-dets is fresh each time.
            found = torch.stack([density.bits_per_dim(x) for x in test[: options.num_test].split(100) for _ in (0, 1)])  # fmt: skip
            weighted = float("nan")
            if name == "indexed":
                some = test[: max(1, options.num_test // 5)]
                weighted = density.bits_per_dim(some, num_particles=options.particles).mean().item()
        per_image = found.unflatten(0, (-1, 2)).mean(1).flatten()
        row = {"study": "images", "data": options.data, "arm": name, "seed": options.seed, "bits": per_image.mean().item(), "se": per_image.std().item() / len(per_image) ** 0.5, "weighted": weighted, "steps": steps, "seconds": options.seconds, "parameters": count(flow)}  # fmt: skip
        rows.append(row)
        print(f"{name:8s} {row['bits']:.3f} ± {row['se']:.3f} bits/dim, weighted {weighted:.3f}   {steps} steps, {count(flow)} parameters", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=("plane", "images"))
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--toy", choices=TOYS, default="two-uniforms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of CPU time, each flow")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--depth", type=int, default=4, help="layers of small and indexed")
    parser.add_argument("--data", choices=("fashion", "cifar"), default="fashion")
    parser.add_argument("--by-pixel", action="store_true", help="standardise every pixel by itself")
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--output", type=Path, help="folder for the .json and the .png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    rows = {"plane": plane, "images": images}[options.study](options)
    if options.output:
        path = options.output / f"indexed_{options.study}.json"
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
