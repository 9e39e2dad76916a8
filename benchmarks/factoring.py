"""Factoring out by likelihood against static splits, on images of 16 x 16 pixels (Das, Abbeel & Spanos 2019, sec. 3.2).

    python benchmarks/factoring.py --seeds 3 --output benchmark-output
    python benchmarks/factoring.py --data fashion --arms channel checkerboard likelihood "likelihood by position"
    python benchmarks/factoring.py --architecture glow --arms channel checkerboard likelihood "likelihood by channel"

Multi-scale flows of three levels, trained in dequantised pixels. `none` is the first step, in which nothing leaves; its
contributions to the log-det make the masks of `likelihood`. Static splits: `channel`, `checkerboard`, and its `other colour`.
Three more say what a mask is worth: `reversed` keeps what `likelihood` gives up, `random` ranks by noise, and `likelihood by
position` ranks means over the image, so that every block loses the same places and a channel of the next level holds
one place. `likelihood by channel` does so across the channels of a block, `in order` as well, with the log singular values of a
1x1 convolution by the number of the channel and shares that stay in place (both are meant for Glow, `--architecture glow`). The factored flows have the same number of parameters and of steps, the same initial values, the same
batches and the same noise at the test. Printed: bits a dimension of test images, mean and sd over seeds, and the
difference to `channel` seed by seed. Writes factoring_DATA.json and .png.

Images are read from `images/` in the folder named by PYRO_FLOWS_DATA: 5000 of CIFAR-10 (the default), or Fashion-MNIST, padded to
32 x 32; the means of blocks of 2 x 2 pixels, rounded to 256 levels. A run that diverges is reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_flows_ext.diagnostics import plots_images
from pyro_flows_ext.distributions import Dequantized, MultiScaleFlow
from pyro_flows_ext.distributions._contributions import masks_by_share, mean_by_place
from pyro_flows_ext.flows import Glow, RealNVPImage
from pyro_flows_ext.infer import fit_density
from pyro_flows_ext.transforms import Squeeze
from pyro_flows_ext.transforms.multiscale import make_mask

ARCHITECTURES = {"realnvp": RealNVPImage, "glow": Glow}
STATIC = ("none", "channel", "checkerboard", "other colour")
RANKED = ("likelihood", "likelihood by position", "likelihood by channel", "in order", "reversed", "random")  # fmt: skip
NUM_TEST, NUM_RANKED, NUM_STARTED = 2000, 2000, 512


def load(name: str) -> tuple[Tensor, Tensor]:
    """Training and test images `(N, C, 16, 16)` of whole numbers up to 255."""
    root = os.environ.get("PYRO_FLOWS_DATA")
    file = {"fashion": "fashion_mnist.npz", "cifar": "cifar10_subset.npz"}[name]
    if not root or not (Path(root) / "images" / file).is_file():
        raise SystemExit(
            f"set PYRO_FLOWS_DATA to the folder that holds images/{file} (now: {root!r})"
        )
    with np.load(Path(root) / "images" / file, allow_pickle=False) as arrays:
        if name == "fashion":
            parts = [np.pad(arrays[k], ((0, 0), (2, 2), (2, 2)))[:, None] for k in ("x_train", "x_test")]  # fmt: skip
        else:
            parts = [decode(arrays[k]) for k in ("x_train_delta", "x_test_delta")]
    train, test = (torch.as_tensor(p, dtype=torch.float32) for p in parts)
    return half_size(train), half_size(test)[:NUM_TEST]


def decode(deltas: np.ndarray) -> np.ndarray:
    """CIFAR-10 from differences along rows and columns, red and blue less green, all modulo 256."""
    x = np.cumsum(np.cumsum(deltas, -2, dtype=np.uint8), -1, dtype=np.uint8)
    x[:, 0] += x[:, 1]
    x[:, 2] += x[:, 1]
    return x


def half_size(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 2).round()


def train(flow: MultiScaleFlow, data: Tensor, seed: int, options: Any) -> Dequantized:
    """The flow behind uniform dequantisation, started from the data's moments."""
    density = Dequantized(flow)
    # Convolutions of so few channels take two thirds of the time with channels last.
    density.to(memory_format=torch.channels_last)
    started = (data[:NUM_STARTED] + 0.5) / density.num_levels
    flow.initialize(density.preprocess(started))  # type: ignore[misc]
    fit_density(
        density,
        data,
        validation=None,
        batch_size=options.batch,
        num_steps=options.steps,
        lr=options.lr,
        clip_norm=20.0,  # below most gradients, so that a rare image does not undo what the others taught
        seed=seed,
        progress=False,
    )
    return density


@torch.no_grad()
def bits(density: Dequantized, test: Tensor) -> Tensor:
    """Bits a dimension of each test image, with the same noise for every flow."""
    noise = torch.rand(test.shape, generator=torch.Generator().manual_seed(0))
    chunks = zip(test.split(250), noise.split(250), strict=True)
    return torch.cat([density.bits_per_dim(x, noise=u) for x, u in chunks])


def choose(shares: list[Tensor], ordered: list[Tensor], seed: int) -> dict[str, list[Tensor]]:
    """Masks for each arm that ranks. `shares`, `ordered`: contributions at every level but the last, carried and not."""
    generator = torch.Generator().manual_seed(seed)
    by_place, ordered = ([mean_by_place(s, i) for i, s in enumerate(x)] for x in (shares, ordered))
    ranked = {
        "likelihood": shares,
        "likelihood by position": by_place,
        "reversed": [-s for s in shares],
        "random": [torch.rand(s.shape, generator=generator) for s in shares],
    }
    across = {"likelihood by channel": by_place, "in order": ordered}
    return {name: masks_by_share(values) for name, values in ranked.items()} | {
        name: masks_by_share(values, across_channels=True) for name, values in across.items()
    }


def static(name: str, shape: Any, num_levels: int = 3) -> Any:
    """What leaves in an arm that does not look at the data. `shape`: of the first level's image."""
    if name != "other colour":
        return name
    sizes = [(shape[0] * 2**i, shape[1] // 2**i, shape[2] // 2**i) for i in range(num_levels - 1)]
    return [~make_mask("checkerboard", size) for size in sizes]


def describe(pixels: Tensor, shares: list[Tensor], chosen: dict[str, Any]) -> dict[str, Any]:
    """Of the first level: how the masks by likelihood agree with others, and what the shares follow within a block.

    That is the share of their variance which the place in the block explains, and their correlation with how narrow a
    pixel's distribution is, minus the log of its sd.
    """
    mask = chosen["likelihood"][0]
    found: dict[str, Any] = {}
    for name in ("channel", "checkerboard", "likelihood by position", "likelihood by channel"):
        other = chosen[name]
        other = make_mask(name, mask.shape) if isinstance(other, str) else other[0]
        found[f"agreement with {name}"] = (mask == other).float().mean().item()
    share, narrow = (in_block(t) for t in (shares[0], -pixels.std(0).log()))
    place = in_block(mean_by_place(shares[0], 0))
    found["explained by place"] = (place.square().sum() / share.square().sum()).item()
    found["correlation with -log sd"] = torch.nn.functional.cosine_similarity(
        share.flatten(), narrow.flatten(), dim=0
    ).item()
    return found


def in_block(share: Tensor) -> Tensor:
    """What is left after the mean of each channel of each block is taken away."""
    means = torch.nn.functional.avg_pool2d(share, 2)
    return share - means.repeat_interleave(2, -1).repeat_interleave(2, -2)


def run(seed: int, data: Tensor, test: Tensor, options: Any) -> tuple[list[dict[str, Any]], dict]:
    """All arms of a seed: rows for the table, and what the figure shows."""
    make = ARCHITECTURES[options.architecture]
    settings = {"num_levels": 3, "num_layers": options.depth, "hidden_dims": (options.hidden,)}
    rows, kept, flows = [], {}, {}
    squeeze = (lambda x: Squeeze()(x)) if options.architecture == "glow" else (lambda x: x)
    shape = squeeze(data[:1]).shape[1:]
    chosen: dict[str, Any] = {name: static(name, shape) for name in STATIC}
    for name in options.arms:
        torch.manual_seed(seed)
        flow = make(data.shape[1:], factor_out=chosen[name], **settings)
        start = time.process_time()
        try:
            density = train(flow, data, seed, options)
        except FloatingPointError as error:
            if name == "none":  # there are no masks without it
                raise
            print(f"seed {seed}  {name:24s} diverged: {error}", flush=True)
            rows.append({"arm": name, "seed": seed, "bits": float("nan")})
            continue
        seconds = time.process_time() - start
        loss = bits(density, test)
        row = {"arm": name, "seed": seed, "bits": loss.mean().item(), "se": (loss.std() / len(loss) ** 0.5).item(), "seconds": seconds, "steps": options.steps, "parameters": sum(p.numel() for p in flow.parameters())}  # fmt: skip
        flows[name] = density
        if name == "none":
            start = time.process_time()
            ranked = data[:NUM_RANKED] + torch.rand_like(data[:NUM_RANKED])
            pixels = density.preprocess(ranked / density.num_levels)  # type: ignore[misc]
            kept["contributions"] = flow.contributions(pixels)
            ordered = flow.contributions(pixels, carry=False)
            chosen |= choose(kept["contributions"][:-1], ordered[:-1], seed)
            row["seconds of contributions"] = time.process_time() - start
            row["masks"] = describe(squeeze(pixels), kept["contributions"], chosen)
        rows.append(row)
        print(f"seed {seed}  {name:24s} {row['bits']:.4f} bits/dim  {seconds:.0f} s", flush=True)
        if "masks" in row:
            print("   ".join(f"{k} {v:.2f}" for k, v in row["masks"].items()), flush=True)
    return rows, kept | {"flows": flows}


def draw(kept: dict[str, Any]) -> Figure:
    """When each element leaves and what it adds, under the masks by likelihood; samples beside."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.2, 1])
    flows = kept["flows"]
    plots_images.factoring(flows["likelihood"].flow, kept["contributions"], figure=left)
    shown = [name for name in ("channel", "likelihood") if name in flows]
    for ax, name in zip(right.subplots(len(shown), 1, squeeze=False).flat, shown, strict=True):
        torch.manual_seed(0)
        rows = flows[name].sample((3, 8)).movedim(2, -1)  # (3, 8, H, W, C)
        picture = rows.movedim(1, 2).flatten(2, 3).flatten(0, 1)
        ax.imshow(picture.squeeze(-1) / 255, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"samples, {name}", fontsize=8)
    return figure


def report(rows: list[dict[str, Any]]) -> None:
    """By arm: mean and sd of bits a dimension, and of the difference to `channel` of the same seed."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row["bits"])
    for name, values in found.items():
        x = np.array(values)
        line = f"{name:24s} {x.mean():.4f}" + (f" ± {x.std(ddof=1):.4f}" if len(x) > 1 else "")
        if "channel" in found and len(found["channel"]) == len(x):
            gap = x - np.array(found["channel"])
            line += "   less channel: " + "  ".join(f"{g:+.4f}" for g in gap)
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("cifar", "fashion"), default="cifar")
    parser.add_argument("--architecture", choices=tuple(ARCHITECTURES), default="realnvp")
    parser.add_argument("--arms", nargs="+", choices=(*STATIC, *RANKED), default=[*STATIC, *RANKED])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--depth", type=int, default=4, help="couplings a level")
    parser.add_argument("--hidden", type=int, default=24, help="channels of their networks")
    parser.add_argument("--output", type=Path, help="folder for the .json and the .png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if set(options.arms) & set(RANKED):  # which need the first step
        options.arms = [*dict.fromkeys(["none", *options.arms])]
    data, test = load(options.data)
    rows: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        new, kept = run(seed, data, test, options)
        rows += new
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            stem = f"factoring_{options.data}" + "_glow" * (options.architecture == "glow")
            (options.output / f"{stem}.json").write_text(json.dumps(rows, indent=1))
            if seed == options.first_seed and "likelihood" in kept["flows"]:
                draw(kept).savefig(options.output / f"{stem}.png", dpi=110)
    report(rows)


if __name__ == "__main__":
    main()
