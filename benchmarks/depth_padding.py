"""What padding does to a flow's conditioning and samples (Koehler, Mehta & Risteski 2021, on padding).

A RealNVP by maximum likelihood in the plane; on (x, 0), two zeros more a row; and on (x, ε), two fresh normal numbers
more. Zero padding has no density, and the likelihood of the padded rows no maximum: it is maximised all the same, on
exact zeros, until the steps run out. Our couplings scale by 1000 at most, which alone bounds it. Samples of x are the
first two coordinates of samples of the flow. Each half of the partition holds one coordinate of x and one of the
padding: with x in one half and noise in the other, the identity is a saddle that training leaves late or never.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

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

NUM_PAD = 2
SETS = {"moons": moons, "eight Gaussians": eight_gaussians}
PADDING = {"none": None, "zero": Pad(NUM_PAD, "zero"), "Gaussian": Pad(NUM_PAD, "gaussian")}
LABELS = {"none": "no padding", "zero": "zero padding", "Gaussian": "Gaussian padding"}


def fit(train: Tensor, test: Tensor, pad: Pad | None, steps: int, seed: int) -> dict:
    """A flow with this padding: numbers, and samples `(N, 2)`."""

    def padded(x: Tensor) -> Tensor:
        return x if pad is None else pad.pad(x)[0]

    def draw_batch(num: int) -> Tensor:
        return padded(train[torch.randint(len(train), (num,))])

    torch.manual_seed(seed)
    dim = 2 if pad is None else 2 + NUM_PAD
    flow = realnvp(dim, num_layers=8, hidden_dims=(64, 64), mask="alternating")
    start = time.perf_counter()
    maximum_likelihood(flow, draw_batch, steps)
    seconds = time.perf_counter() - start
    z = base(dim).sample((len(test),))
    with torch.no_grad():
        samples = flow.forward_and_ladj(z)[0][:, :2]
        objective = log_prob(flow, padded(test)).mean().item()
    kappa = jacobian_condition_number(in_float64(flow), z[:2000].double())
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
        train, test, other = draw_data(20_000), draw_data(num_test), draw_data(num_test)
        noise = energy_distance(other, test)
        pictures[name] = {"data": test}
        print(f"{name}: energy distance of two samples of the data {noise:.1e}", flush=True)
        for padding, pad in PADDING.items():
            fits = [fit(train, test, pad, steps, seed) for seed in range(seeds)]
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

    figure = Figure(figsize=(2.1 * (1 + len(PADDING)), 2.3 * len(pictures)), layout="constrained")
    axes = figure.subplots(
        len(pictures), 1 + len(PADDING), squeeze=False, sharex="row", sharey="row"
    )
    for line, (name, panels) in zip(axes, pictures.items(), strict=True):
        numbers = {row["padding"]: row for row in rows if row["set"] == name}
        for ax, (title, points) in zip(line, panels.items(), strict=True):
            shown = points[:2000]
            color = COLORS[3] if title == "data" else COLORS[0]
            ax.scatter(*shown.T.numpy(), s=0.6, color=color, alpha=0.5, linewidths=0)
            if title in numbers:
                row = numbers[title]
                distance, kappa = row["distance"][0], row["kappa"][0]
                title = (
                    f"{LABELS[title]}\nenergy distance {distance:.4f}\ncondition number {kappa:.0f}"
                )
            else:
                title = name
            ax.set_title(title, fontsize=8)
            ax.set(xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[], aspect="equal")
    figure.savefig(path, dpi=80)
