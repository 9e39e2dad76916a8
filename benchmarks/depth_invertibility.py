"""What a target in two pieces does to a flow's Lipschitz constants, and these to its round trips in float32.

A continuous map from a normal to two separate squares must tear: where the fit improves, one of f and f⁻¹ grows steep
(Cornish, Caterini, Deligiannidis & Doucet 2020), and rounding errors grow with it (Behrmann et al. 2021). f leads from
the base to the data; the residual flow's layers x + g(x) lead from the data to the base, and are inverted to sample.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from depth_training import COLORS, base, in_float64, log_prob, maximum_likelihood, two_squares

from pyro_flows_ext.diagnostics import lipschitz_estimate, round_trip_error
from pyro_flows_ext.transforms import nsf, realnvp, residual

FLOWS = {
    "affine": lambda: realnvp(2, num_layers=8, hidden_dims=(64, 64)),
    "spline": lambda: nsf(2, num_layers=4, hidden_dims=(64, 64)),
    "residual": lambda: residual(2, num_layers=6, hidden_dims=(32, 32), exact_log_det=True).inv,
}
MEASURES = {
    "lipschitz": "Lipschitz constant of f",
    "lipschitz_inverse": "Lipschitz constant of f⁻¹",
    "round_trip_base": "|f⁻¹(f(z)) - z| at z of the base",
    "round_trip_data": "|f(f⁻¹(y)) - y| at the data y",
}


def train(make, steps: int, marks: list[int], seed: int, num_points: int = 1000) -> list[dict]:
    """What the flow was like at the steps `marks`: largest values over `num_points` points, and the held-out score."""
    torch.manual_seed(seed)
    flow, y, z = make(), two_squares(num_points), base(2).sample((num_points,))
    looks = []

    def look(step: int) -> None:
        if step not in marks:
            return
        constants = lipschitz_estimate(in_float64(flow), z.double())
        with torch.no_grad():
            score = log_prob(flow, y).mean().item()
        looks.append(
            {
                "step": step,
                "log_likelihood": score,
                "lipschitz": constants.forward,
                "lipschitz_inverse": constants.inverse,
                "round_trip_base": round_trip_error(flow, z).max().item(),
                "round_trip_data": round_trip_error(flow.inv, y).max().item(),
            }
        )

    maximum_likelihood(flow, two_squares, steps, look=look)
    return looks


def run(seeds: int, quick: bool) -> list[dict]:
    """One row for each flow, seed and step that was looked at; prints the first and the last of each flow."""
    steps = 150 if quick else 800
    marks = sorted({0, steps, *(round(10 ** (k / 4)) for k in range(13) if 10 ** (k / 4) < steps)})
    rows = []
    for name, make in FLOWS.items():
        start = time.perf_counter()
        for seed in range(seeds):
            looks = train(make, steps, marks, seed)
            rows += [{"flow": name, "seed": seed, **look} for look in looks]
        seconds = (time.perf_counter() - start) / seeds
        for step in sorted({0, marks[len(marks) // 2], steps}):
            at = {key: _median(rows, name, step, key) for key in (*MEASURES, "log_likelihood")}
            print(
                f"{name:9s} step {step:<5} log-likelihood {at['log_likelihood']:.3f} nats   "
                f"Lipschitz f {at['lipschitz']:.3g}, f⁻¹ {at['lipschitz_inverse']:.3g}   "
                f"round trip base {at['round_trip_base']:.1e}, data {at['round_trip_data']:.1e}   {seconds:.0f} s",
                flush=True,
            )
    return rows


def _median(rows: list[dict], flow: str, step: int, key: str) -> float:
    return statistics.median(r[key] for r in rows if r["flow"] == flow and r["step"] == step)


def draw(rows: list[dict], path: Path) -> None:
    """Every measure against the step: medians over seeds, and the seeds behind them, thin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for ax, (key, title) in zip(axes.flat, MEASURES.items(), strict=True):
        for flow, color in zip(FLOWS, COLORS, strict=False):
            steps = sorted({r["step"] for r in rows if r["flow"] == flow} - {0})
            ax.plot(steps, [_median(rows, flow, s, key) for s in steps], color=color, label=flow)
            for seed in sorted({r["seed"] for r in rows}):
                line = [r for r in rows if (r["flow"], r["seed"]) == (flow, seed) and r["step"]]
                values = [r[key] for r in line]
                ax.plot([r["step"] for r in line], values, color=color, lw=0.5, alpha=0.5)
        ax.set_title(title, fontsize=9)
        ax.set(xscale="log", yscale="log")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("training step")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].set_ylabel("largest error, float32")
    figure.savefig(path, dpi=100)
