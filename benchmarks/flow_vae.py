"""Flow-VAE beside a plain VAE and a plain flow on scikit-learn's digits, by their bounds on test images.

    python benchmarks/flow_vae.py --seeds 2 --output benchmark-output

`FlowVAE` (Das, Abbeel & Spanos 2019): an exact Glow-like flow between 8 x 8 images and z, and a small VAE of z. Beside it the same
networks without the flow (one affine map of all pixels in its place), a VAE with wider networks that has as many parameters
as `FlowVAE`, and the flow alone with a standard normal z. `FlowVAE` is trained in two ways: all at once, or first the
networks, with the flow as it starts, and then all.

All are densities of the same logits of dequantised pixels, the best step chosen by validation images. Printed for each seed: the
ELBO and the importance-weighted bound on test images, as log-density of the pixels in [0, 1] in nats and, of the latter, as bits by
pixel; and how many of ε's coordinates are in use (variance of their posterior mean above .01). Writes flow_vae.json and
flow_vae.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from pyro_flows_ext.distributions import Dequantized, FlowVAE, MultiScaleFlow
from pyro_flows_ext.flows import Glow
from pyro_flows_ext.infer import fit_density
from pyro_flows_ext.transforms import ActNorm, LogitPreprocess, Pixelwise

SHAPE, D, NUM_GREYS, ALPHA = (1, 8, 8), 64, 17, 0.05
HIDDEN, NUM_TEST, NUM_VALIDATION = 128, 360, 200
LOGIT = LogitPreprocess(ALPHA)
NAMES = ("VAE", "VAE, wide", "flow", "Flow-VAE, at once", "Flow-VAE")


class Digits(NamedTuple):
    """Images `(N, 1, 8, 8)` of whole numbers from 0 to 16."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load_digits(seed: int) -> Digits:
    from sklearn import datasets

    images = torch.as_tensor(datasets.load_digits().images, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, validation, train = images[order].split([NUM_TEST, NUM_VALIDATION, len(images) - NUM_TEST - NUM_VALIDATION])  # fmt: skip
    return Digits(train, validation, test)


def to_logits(images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of dequantised images, the noise fixed by `seed`, and log|ds / dy| of y in [0, 1]: `(N, 1, 8, 8)`, `(N)`."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    return LOGIT.forward_and_ladj((images + noise) / NUM_GREYS)  # type: ignore[no-any-return]


def make(name: str, logits: Tensor, latent: int) -> FlowVAE | MultiScaleFlow:
    """One of the densities, its ActNorms started at the moments of the data."""
    if "flow" in name.lower():
        flow = Glow(SHAPE, num_levels=2, num_layers=2, hidden_dims=(24, 24))
    else:
        flow = MultiScaleFlow(SHAPE, lambda shape: Pixelwise(ActNorm(shape[0])), num_levels=1)
    flow.initialize(logits)
    if name == "flow":
        return flow
    hidden = (HIDDEN, HIDDEN)
    if name == "VAE, wide":
        target = num_parameters(make("Flow-VAE", logits, latent))
        while num_parameters(FlowVAE(flow.transform, D, latent, hidden_dims=hidden)) < target:  # type: ignore[arg-type]
            hidden = (hidden[0] + 8, hidden[1] + 8)
    return FlowVAE(flow.transform, D, latent, hidden_dims=hidden)  # type: ignore[arg-type]


def num_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def run(name: str, seed: int, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """One row of the table, and the trained density of logits."""
    digits = load_digits(seed)
    torch.manual_seed(100 + seed)
    density = make(name, to_logits(digits.train, seed)[0], options.latent)
    start = time.process_time()
    steps = options.vae_steps if name.startswith("VAE") else options.steps
    first_steps = options.first_steps if name == "Flow-VAE" else 0
    best_step = fit_density(
        Dequantized(density, num_levels=NUM_GREYS, logit_alpha=ALPHA),
        digits.train,
        validation=digits.validation,
        batch_size=options.batch,
        num_steps=first_steps + steps,
        first_steps=first_steps,
        lr=options.lr,
        patience=None,
        seed=seed,
        progress=False,
    ).best_step
    seconds = time.process_time() - start
    torch.manual_seed(1000)
    row = {"density": name, "seed": seed, "parameters": num_parameters(density), **score(density, digits.test, options.particles)}  # fmt: skip
    return {**row, "best_step": best_step, "cpu_seconds": seconds}, density


@torch.no_grad()
def score(density: FlowVAE | MultiScaleFlow, test: Tensor, particles: int) -> dict[str, float]:
    """Bounds on log p(y) of the test images, y in [0, 1], with the same noise for every density."""
    logits, ladj = to_logits(test, 0)
    if isinstance(density, FlowVAE):
        elbo = density.log_prob(logits.expand(10, *logits.shape)).mean(0)
        weighted = density.log_prob_bound(logits, particles, chunk_size=50)
        used = int((density.encode(logits).var(0) > 0.01).sum())
    else:
        elbo = weighted = density.log_prob(logits)
        used = 0
    elbo, weighted = elbo + ladj, weighted + ladj
    error = weighted.std().item() / math.sqrt(len(test))
    bits = math.log2(NUM_GREYS) - weighted.mean().item() / (D * math.log(2))
    return {"elbo": elbo.mean().item(), "iwae": weighted.mean().item(), "standard_error": error, "bits": bits, "used": used}  # fmt: skip


@torch.no_grad()
def draw(densities: dict[str, Any], test: Tensor) -> Figure:
    """By column a density, by row test images and what their codes tell, samples, and ways between two codes."""
    logits = to_logits(test[:10], 0)[0]
    names = ("VAE, wide", "Flow-VAE, at once", "Flow-VAE", "flow")
    figure = Figure(figsize=(11, 3.3), layout="constrained")
    cells = figure.subplots(3, len(names), height_ratios=[2, 3, 3])
    for cell in cells.flat:
        cell.set_axis_off()
    for column, name in zip(cells.T, names, strict=True):
        density = densities[name]
        torch.manual_seed(3)
        _show(column[1], density.sample((30,)), f"{name}: samples")
        if isinstance(density, FlowVAE):
            codes = density.decode(density.encode(logits))
            _show(column[0], torch.cat([logits, codes]), f"{name}: test, and f(μ(ε))")
            ways = [density.interpolate(logits[i], logits[i + 1], 10) for i in (0, 2, 6)]
            _show(column[2], torch.cat(ways), f"{name}: between codes")
    return figure


def _show(cell: Any, logits: Tensor, title: str) -> None:
    """Rows of ten images."""
    greys = (LOGIT.inv(logits) * NUM_GREYS).floor().clamp(0, NUM_GREYS - 1)
    images = F.pad(greys.squeeze(1), (1, 1, 1, 1))
    rows = [torch.cat(list(part), -1) for part in images.split(10)]
    cell.imshow(torch.cat(rows), cmap="gray_r", interpolation="nearest")
    cell.set_title(title, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800, help="of all with a flow")
    parser.add_argument("--first-steps", type=int, default=600, help="of the networks alone")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--particles", type=int, default=200, help="K of the weighted bound")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--output", type=Path, help="folder for flow_vae.json and flow_vae.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| density | seed | parameters | ELBO | weighted | bits by pixel | ε in use | best step | CPU s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in range(options.seeds):
        densities = {}
        for name in options.names:
            row, densities[name] = run(name, seed, options)
            rows.append(row)
            print(
                f"| {name} | {seed} | {row['parameters']} | {row['elbo']:.2f} | {row['iwae']:.2f} ± {row['standard_error']:.2f} "
                f"| {row['bits']:.3f} | {row['used']} | {row['best_step']} | {row['cpu_seconds']:.0f} |",
                flush=True,
            )
        if seed == 0 and options.output and set(densities) == set(NAMES):
            options.output.mkdir(parents=True, exist_ok=True)
            draw(densities, load_digits(0).test).savefig(options.output / "flow_vae.png", dpi=80)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "flow_vae.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
