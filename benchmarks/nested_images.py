"""Nested dropout on images of 16 x 16 pixels: reconstructions, samples and likelihood with and without it.

    PYRO_FLOWS_DATA=... python benchmarks/nested_images.py --arms 0 20:.03 --seeds 2 --output benchmark-output
    PYRO_FLOWS_DATA=... python benchmarks/nested_images.py --arms 0 5:.03 80:.03 20:.01 20:.1 --output benchmark-output
    python benchmarks/nested_images.py --report --output benchmark-output

RQ-NSF (C) of three levels of four steps, of dequantised pixels in [0, 1] (Bekasov & Murray 2020, sec. 3.2). An arm is λ:p, the
weight of the penalty in nats by squared unit and the probability of the geometric index; 0 is the flow without the penalty. All
arms of a seed share the start, the steps, the batches and the noise at the test. Printed: bits by dimension of test images, the
relative loss of likelihood, and the mean squared error by pixel from 1 %, 3 %, 10 %, 25 % and 50 % of the latents.

An arm is trained once: its checkpoint and its row stay in the output folder, and a run that was stopped goes on from there.
`--report` evaluates what the folder holds, unfinished arms included, and draws nested_images_DATA.png: errors by number of
latents, reconstructions and samples by number of latents.

Images are those of factoring.py, from the folder named by PYRO_FLOWS_DATA: Fashion-MNIST or CIFAR-10 at 16 x 16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from factoring import load
from matplotlib.figure import Figure
from nested_digits import principal_components
from torch import Tensor

from pyro_flows_ext.distributions import Dequantized, NestedDropoutFlow
from pyro_flows_ext.flows import NSFImage
from pyro_flows_ext.infer import fit_density

SHARES = (0.01, 0.03, 0.1, 0.25, 0.5)
NUM_SCORED, NUM_RECONSTRUCTED, NUM_STARTED = 1000, 200, 512


def kept(size: int) -> list[int]:
    """The numbers of latents of the table."""
    return [round(share * size) for share in SHARES]


def read_arm(arm: str) -> tuple[float, float]:
    """λ and p of "λ:p"; p plays no part where λ = 0."""
    weight, _, prob = arm.partition(":")
    return float(weight), float(prob or 0.5)


def make(arm: str, data: Tensor, seed: int, options: argparse.Namespace) -> Dequantized:
    """The flow of an arm behind uniform dequantisation, its ActNorms started at the moments of the data."""
    torch.manual_seed(100 + seed)
    shape = tuple(data.shape[1:])
    architecture = NSFImage(
        shape, num_levels=3, num_layers=options.layers, hidden_dims=(options.channels,)
    )
    images = data[:NUM_STARTED]
    architecture.initialize((images + torch.rand_like(images)) / 256)
    weight, prob = read_arm(arm)
    size = data[0].numel()
    flow = NestedDropoutFlow(
        dist.Normal(torch.zeros(size), 1.0),
        architecture.transform,
        index_prob=prob,
        reconstruction_weight=weight,
    )
    # Convolutions of so few channels take two thirds of the time with channels last.
    return Dequantized(flow, logit_alpha=None).to(memory_format=torch.channels_last)


def file_of(arm: str, seed: int, options: argparse.Namespace) -> Path:
    name = f"nested_{options.data}_{arm.replace(':', '-')}_{seed}.pt"
    return Path(options.output / name)


def train(arm: str, data: Tensor, seed: int, options: argparse.Namespace) -> None:
    """Trains an arm, or goes on; leaves parameters, steps and CPU seconds in its file."""
    file = file_of(arm, seed, options)
    if file.exists() and torch.load(file)["steps"] == options.steps:
        return
    density = make(arm, data, seed, options)
    before = torch.load(file)["cpu_seconds"] if file.exists() else 0.0
    start = time.process_time()

    def save(state: Any) -> None:
        seconds = before + time.process_time() - start
        torch.save({"state": density.state_dict(), "steps": state.step, "of": options.steps, "cpu_seconds": seconds}, file)  # fmt: skip
        print(f"{arm:8s} seed {seed}  step {state.step}  {seconds:.0f} CPU s  loss {state.loss:.2f}", flush=True)  # fmt: skip

    fit_density(
        density,
        data,
        validation=None,
        batch_size=options.batch,
        num_steps=options.steps,
        lr=options.lr,
        clip_norm=100.0,
        patience=None,
        seed=seed,
        progress=False,
        evaluate_every=max(1, options.steps // 20),
        callback=save,
        checkpoint=file.with_suffix(".checkpoint"),
        resume=True,
    )


@torch.no_grad()
def score(density: Dequantized, test: Tensor) -> dict[str, Any]:
    """Bits by dimension and errors of reconstruction of test images, with the same noise for every arm."""
    flow: Any = density.flow
    noise = torch.rand(test.shape, generator=torch.Generator().manual_seed(0))
    parts = zip(test[:NUM_SCORED].split(250), noise[:NUM_SCORED].split(250), strict=True)
    bits = torch.cat([density.bits_per_dim(x, noise=u) for x, u in parts])
    pixels = ((test + noise) / 256)[:NUM_RECONSTRUCTED]
    size = pixels[0].numel()
    ks = sorted({*kept(size), *(round(size ** (i / 9)) for i in range(9))})
    curve = flow.reconstruction_curve(pixels, ks, chunk_size=250)
    # The order of a multi-scale flow keeps the latents of the last level first.
    flow.order = flow.order.flip(0)
    reverse = flow.reconstruction_curve(pixels, kept(size), chunk_size=250)
    flow.order = flow.order.flip(0)
    error = (bits.std() / len(bits) ** 0.5).item()
    return {"bits": bits.mean().item(), "standard_error": error, "ks": ks, "mse": curve.tolist(), "reverse": reverse.tolist()}  # fmt: skip


def report(options: argparse.Namespace) -> None:
    """Prints and draws what the output folder holds."""
    data, test = load(options.data)
    size = data[0].numel()
    ks = kept(size)
    rows: list[dict[str, Any]] = []
    drawn: dict[str, Any] = {}
    pixels = (data[:5000] + 0.5) / 256
    principal = principal_components(pixels, (test[:NUM_RECONSTRUCTED] + 0.5) / 256)
    print(
        f"| λ:p | seed | steps | CPU s | bits/dim | nats | {' | '.join(map(str, ks))} of {size} |"
    )
    print("|---|---|---|---|---|---|" + "---|" * len(ks))
    errors = [f"{principal[k - 1]:.5f}" for k in ks]
    print(f"| principal components | | | | | | {' | '.join(errors)} |")
    for seed in range(options.seeds):
        for arm in options.arms:
            file = file_of(arm, seed, options)
            if not file.exists():
                continue
            saved = torch.load(file)
            density = make(arm, data, seed, options)
            density.load_state_dict(saved["state"])
            density.eval()
            row = {"arm": arm, "seed": seed, "steps": saved["steps"], "of": saved["of"], "cpu_seconds": saved["cpu_seconds"], **score(density, test)}  # fmt: skip
            rows.append(row)
            if seed == 0:
                drawn[arm] = (row, density.flow)
            by_k = dict(zip(row["ks"], row["mse"], strict=True))
            nats = (8 - row["bits"]) * size * 0.6931471805599453
            reverse = dict(zip(ks, row["reverse"], strict=True))
            print(
                f"| {arm} | {seed} | {row['steps']} | {row['cpu_seconds']:.0f} | {row['bits']:.3f} ± {row['standard_error']:.3f} | {nats:.1f} "
                f"| {' | '.join(f'{by_k[k]:.5f}' for k in ks)} |\n"
                f"| the same, first level kept first | | | | | | {' | '.join(f'{reverse[k]:.5f}' for k in ks)} |",
                flush=True,
            )
    name = f"nested_images_{options.data}"
    (options.output / f"{name}.json").write_text(json.dumps(rows, indent=1))
    draw(drawn, principal, (test[:8] + 0.5) / 256).savefig(options.output / f"{name}.png", dpi=110)


def draw(arms: dict[str, Any], principal: Tensor, images: Tensor) -> Figure:
    """Errors by number of latents; for the first two arms, test images and samples from few latents and from all."""
    size = len(principal)
    shown = list(arms.items())[:2]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.6])
    axes = left.subplots()
    axes.loglog(range(1, size), principal[:-1], "k:", label="principal components")
    for arm, (row, _) in arms.items():
        label = "without" if read_arm(arm)[0] == 0 else "λ = {:g}, p = {:g}".format(*read_arm(arm))
        axes.loglog(row["ks"], row["mse"], label=label)
    # From as many principal components as there are pixels within the border, the error is that of rounding.
    axes.set_ylim(bottom=3e-4)
    axes.set_xlabel("latents kept")
    axes.set_ylabel("mean squared error by pixel")
    axes.legend(fontsize=8)
    panels = right.subplots(2, len(shown), squeeze=False)
    for column, (arm, (_, flow)) in zip(panels.T, shown, strict=True):
        name = "without" if read_arm(arm)[0] == 0 else "nested dropout"
        with torch.no_grad():
            told = [flow.reconstruct(images, k) for k in (*kept(size), size)]
            torch.manual_seed(3)
            samples = [flow.sample_truncated(k, (8,)) for k in (*kept(size), size)]
        _show(column[0], told, f"{name}: test images from k latents", size)
        _show(column[1], samples, f"{name}: samples of k latents", size)
    return figure


def _show(cell: Any, columns: list[Tensor], title: str, size: int) -> None:
    """Rows of images by number of latents, and images of one number side by side."""
    rows = []
    for images in columns:
        tiles = F.pad(images.clamp(0, 1), (1, 1, 1, 1), value=1.0)
        rows.append(torch.cat(list(tiles), -1))
    whole = torch.cat(rows, -2).permute(1, 2, 0)
    cell.imshow(whole.squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    height = columns[0].shape[-2] + 2
    cell.set_yticks([height * (i + 0.5) for i in range(len(rows))], [*kept(size), size], fontsize=8)
    cell.set_xticks([])
    cell.set_title(title, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("fashion", "cifar"), default="fashion")
    parser.add_argument("--arms", nargs="+", default=["0", "20:.03"], help="λ:p; 0 for none")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=24)
    parser.add_argument("--layers", type=int, default=4, help="steps by level")
    parser.add_argument("--report", action="store_true", help="evaluate the folder, train nothing")
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.report:
        data, _ = load(options.data)
        for seed in range(options.seeds):
            for arm in options.arms:
                train(arm, data, seed, options)
    report(options)


if __name__ == "__main__":
    main()
