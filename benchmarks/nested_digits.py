"""Nested dropout on scikit-learn's digits: how much of an image the first latents of a spline flow tell.

    python benchmarks/nested_digits.py --seeds 2 --output benchmark-output

RQ-NSF (C) of three levels on 8 x 8 images, dequantised to [0, 1], trained with and without nested dropout (Bekasov & Murray
2020): the same start, steps and batches. Printed: test log-likelihood in nats and in bits by pixel, mean squared error of
reconstruction from 1, 3, 6, 13, 32 of 64 latents, beside principal components. Writes nested_digits.json and
nested_digits.png: errors by number of latents, and reconstructions.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from pyro_flows_ext.distributions import NestedDropoutFlow
from pyro_flows_ext.flows import NSFImage
from pyro_flows_ext.infer import fit_density

KEPT = (1, 3, 6, 13, 32)
NUM_TEST, NUM_GREYS = 360, 17


def load_digits(seed: int) -> tuple[Tensor, Tensor]:
    """Training and test images `(N, 1, 8, 8)` in [0, 1], their 17 greys spread by uniform noise."""
    from sklearn import datasets

    torch.manual_seed(seed)
    images = torch.as_tensor(datasets.load_digits().images, dtype=torch.float32).unsqueeze(1)
    images = (images + torch.rand_like(images)) / NUM_GREYS
    images = images[torch.randperm(len(images))]
    return images[NUM_TEST:], images[:NUM_TEST]


def train(data: Tensor, weight: float, options: argparse.Namespace, seed: int) -> NestedDropoutFlow:
    """A flow with `weight` times the penalty of nested dropout; 0 is the same flow without."""
    torch.manual_seed(seed)
    architecture = NSFImage((1, 8, 8), num_levels=3, num_layers=2, hidden_dims=(24,))
    architecture.initialize(data)
    base = dist.Normal(torch.zeros(64), 1.0)
    flow = NestedDropoutFlow(
        base, architecture.transform, index_prob=options.prob, reconstruction_weight=weight
    )
    fit_density(
        flow,
        data,
        validation=None,
        batch_size=options.batch,
        num_steps=options.steps,
        lr=options.lr,
        clip_norm=20.0,
        seed=seed,
        progress=False,
    )
    return flow


def principal_components(data: Tensor, test: Tensor) -> Tensor:
    """The mean squared error of the test images from their first 1 to D principal components."""
    mean = data.flatten(1).mean(0)
    _, _, axes = torch.linalg.svd(data.flatten(1) - mean, full_matrices=False)
    centred = test.flatten(1) - mean
    codes = centred @ axes.T
    return torch.stack(
        [(centred - codes[:, :k] @ axes[:k]).square().mean() for k in range(1, len(axes) + 1)]
    )


def draw(curves: dict[str, Tensor], flows: dict[str, NestedDropoutFlow], test: Tensor) -> Figure:
    """The curves, and eight test images from 1, 3, 6, 13, 32 and all latents of each flow."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    axes = figure.subplots(1, 1 + len(flows), width_ratios=[1.2] + [1] * len(flows))
    for name, curve in curves.items():
        axes[0].semilogy(range(1, 64), curve[:-1], label=name)
    axes[0].set_xlabel("latents kept")
    axes[0].set_ylabel("mean squared error")
    axes[0].legend(fontsize=8)
    for panel, (name, flow) in zip(axes[1:], flows.items(), strict=True):
        with torch.no_grad():
            columns = [flow.reconstruct(test[:8], k).clamp(0, 1) for k in (*KEPT, 64)]
        # A pixel of white paper between any two images.
        tiles = [F.pad(c.squeeze(1), (1, 1, 1, 1)).flatten(0, 1) for c in columns]
        panel.imshow(torch.cat(tiles, -1), cmap="gray_r", interpolation="nearest")
        panel.set_xticks([4.5 + 10 * i for i in range(6)], [*map(str, KEPT), "64"], fontsize=8)
        panel.set_yticks([])
        panel.set_xlabel("latents kept")
        panel.set_title(name, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight", type=float, default=20.0, help="nats by squared unit")
    parser.add_argument("--prob", type=float, default=0.1, help="of the geometric index")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, help="folder for nested_digits.json and .png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        data, test = load_digits(seed)
        curves = {"principal components": principal_components(data, test)}
        flows: dict[str, NestedDropoutFlow] = {}
        for name, weight in (("flow", 0.0), ("nested dropout", options.weight)):
            start = time.process_time()
            flow = train(data, weight, options, 100 + seed)
            seconds = time.process_time() - start
            with torch.no_grad():
                scores = flow.log_prob(test)
                train_log_lik = flow.log_prob(data).mean().item()
            log_lik, error = scores.mean().item(), (scores.std() / len(scores) ** 0.5).item()
            bits = math.log2(NUM_GREYS) - log_lik / (64 * math.log(2))
            curves[name], flows[name] = flow.reconstruction_curve(test), flow
            rows.append({"flow": name, "seed": seed, "log_likelihood": log_lik, "standard_error": error, "train": train_log_lik, "bits": bits, "mse": curves[name].tolist(), "cpu_seconds": seconds})  # fmt: skip
            print(f"{name:15s} seed {seed}  log-likelihood {log_lik:.2f} ± {error:.2f} nats ({train_log_lik:.2f} on training images)  {bits:.3f} bits by pixel  {seconds:.0f} CPU s", flush=True)  # fmt: skip
        for name, curve in curves.items():
            errors = "  ".join(f"{k}: {curve[k - 1]:.4f}" for k in KEPT)
            print(f"  {name:22s} MSE from {errors}", flush=True)
        if seed == 0 and options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            draw(curves, flows, test).savefig(options.output / "nested_digits.png", dpi=110)
    if options.output:
        (options.output / "nested_digits.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
