"""What padding does to a flow's conditioning and samples (Koehler, Mehta & Risteski 2021, on padding).

A RealNVP by maximum likelihood in the plane; on (x, 0), two zeros more a row; and on (x, ε), two fresh normal numbers
more. Zero padding has no density, and the likelihood of the padded rows no maximum: it is maximised all the same, on
exact zeros, until the steps run out. Our couplings scale by 1000 at most, which alone bounds it. Samples of x are the
first coordinates of samples of the flow. The same for digits of 8 x 8 pixels, with as many numbers again. Each half of the partition holds one coordinate of x and one of the
padding: with x in one half and noise in the other, the identity is a saddle that training leaves late or never.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from depth_training import (
    COLORS,
    base,
    eight_gaussians,
    energy_distance,
    in_float64,
    log_prob,
    maximum_likelihood,
    moons,
)
from torch import Tensor

from pyro_flows_ext.diagnostics import jacobian_condition_number
from pyro_flows_ext.transforms import Pad, realnvp

KINDS: dict[str, Literal["zero", "gaussian"] | None] = {
    "none": None,
    "zero": "zero",
    "Gaussian": "gaussian",
}
LABELS = {"none": "no padding", "zero": "zero padding", "Gaussian": "Gaussian padding"}


def plane(draw: Callable[[int], Tensor]) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """Draws to train on, to test on, and others."""
    return lambda num: (draw(20_000), draw(num), draw(num))


def digits(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of dequantised pixels of scikit-learn's digits, `(N, 64)`: 1297 images to train on, 250 to test on, 250 others."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().data).float()
    pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
    groups = pixels.split([1297, 250, 250])
    whole = [
        group.repeat(max(1, size // len(group)), 1)
        for group, size in zip(groups, (20_000, num, num), strict=True)
    ]
    train, test, other = (torch.logit(0.05 + 0.9 * (x + torch.rand_like(x)) / 17) for x in whole)
    return train, test, other


SETS = {"moons": plane(moons), "eight Gaussians": plane(eight_gaussians), "digits": digits}


def fit(
    train: Tensor, test: Tensor, kind: Literal["zero", "gaussian"] | None, steps: int, seed: int
) -> dict:
    """A flow with this padding, as many numbers as there are: numbers, and samples `(N, D)`."""
    num = train.shape[-1]
    pad = None if kind is None else Pad(num, kind)

    def padded(x: Tensor) -> Tensor:
        return x if pad is None else pad.pad(x)[0]

    def draw_batch(num: int) -> Tensor:
        return padded(train[torch.randint(len(train), (num,))])

    torch.manual_seed(seed)
    dim = num if pad is None else 2 * num
    flow = realnvp(dim, num_layers=8, hidden_dims=(64, 64), mask="alternating")
    start = time.perf_counter()
    maximum_likelihood(flow, draw_batch, steps)
    seconds = time.perf_counter() - start
    z = base(dim).sample((len(test),))
    with torch.no_grad():
        samples = flow.forward_and_ladj(z)[0][:, :num]
        objective = log_prob(flow, padded(test)).mean().item()
    kappa = jacobian_condition_number(in_float64(flow), z[: 2000 if num == 2 else 200].double())
    median, high = kappa.quantile(torch.tensor([0.5, 0.95]).double()).tolist()
    return {
        "distance": energy_distance(samples, test),
        "kappa": median,
        "kappa_95": high,
        "objective": objective,
        "seconds": seconds,
        "samples": samples,
    }


def run(seeds: int, quick: bool) -> tuple[list[dict], dict]:
    """One row for every set and padding, and the samples of the first seed for the picture; prints the rows."""
    steps, num_test = (200, 2000) if quick else (800, 10_000)
    rows, pictures = [], {}
    for name, draw_data in SETS.items():
        torch.manual_seed(0)
        train, test, other = draw_data(num_test)
        noise = energy_distance(other, test)
        pictures[name] = {"data": test}
        print(f"{name}: energy distance of two samples of the data {noise:.1e}", flush=True)
        for padding, kind in KINDS.items():
            fits = [fit(train, test, kind, steps, seed) for seed in range(seeds)]
            pictures[name][padding] = fits[0]["samples"]
            row = {"set": name, "padding": padding, "noise": noise}
            for key in ("distance", "kappa", "kappa_95", "objective", "seconds"):
                row[key] = [result[key] for result in fits]
            rows.append(row)
            median = {key: statistics.median(row[key]) for key in ("kappa", "kappa_95")}
            shown = "  ".join(f"{value:8.1e}" for value in row["distance"])
            print(
                f"{name:15s} {padding:8s} energy distance {shown}   condition number {median['kappa']:.3g} "
                f"(95 %: {median['kappa_95']:.3g})   {statistics.median(row['seconds']):.0f} s",
                flush=True,
            )
    return rows, pictures


def draw(rows: list[dict], pictures: dict, path: Path) -> None:
    """The data and samples under each padding, a row for each set; numbers of the seed that is shown in the titles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * (1 + len(KINDS)), 2.3 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), 1 + len(KINDS), squeeze=False)
    for line, (name, panels) in zip(axes, pictures.items(), strict=True):
        numbers = {row["padding"]: row for row in rows if row["set"] == name}
        for ax, (title, points) in zip(line, panels.items(), strict=True):
            if points.shape[-1] == 2:
                color = COLORS[3] if title == "data" else COLORS[0]
                ax.scatter(*points[:2000].T.numpy(), s=0.6, color=color, alpha=0.5, linewidths=0)
                ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
            else:
                tiles = points[:36].sigmoid().view(6, 6, 8, 8).transpose(1, 2).reshape(48, 48)
                ax.imshow(tiles.numpy(), cmap="gray_r", vmin=0.05, vmax=0.95)
            if title in numbers:
                row = numbers[title]
                distance, kappa = row["distance"][0], row["kappa"][0]
                title = (
                    f"{LABELS[title]}\nenergy distance {distance:.4f}\ncondition number {kappa:.0f}"
                )
            else:
                title = name
            ax.set_title(title, fontsize=8)
            ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=80)
