"""Training speed of `fit_density` beside the training loop of zuko's tutorial, on the same rows, in one run.

    python benchmarks/density_training.py
    python benchmarks/density_training.py --flows nsf maf --rows 5000 --steps 600 --repeats 1
    python benchmarks/density_training.py --flows nsf nsf-ar --rows 5000 --dim 64 --batch 1024 --steps 60 --repeats 3

Same architectures (`benchmarks/peers.py`: two hidden layers of 128, as many layers, 8 bins), rows, batch size and number of
steps; Adam in both. zuko's loop has a constant rate, 1e-3 as in its tutorial and 3e-3, the rate at which `fit_density`
starts its cosine. Both score the validation rows every 100 steps, on the clock. Seconds are CPU seconds of one thread.
Printed: milliseconds a step, the lowest validation loss in nats a row, and seconds until the validation loss is first within
.01 of the worst of the lowest ones.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peers import ARCHITECTURES, BINS, BOUND, HIDDEN, build, missing
from torch import Tensor

import pyro_flows_ext as pf

EVERY, LR = 100, 3e-3
SIZES = {5000: 4, 30_000: 8}
TOLERANCE = 0.01


class Curve(NamedTuple):
    """Seconds of the steps alone, and (seconds, validation loss) at each evaluation."""

    steps: float
    points: list[tuple[float, float]]

    @property
    def best(self) -> float:
        return min(value for _, value in self.points)

    def seconds_to(self, loss: float) -> float:
        """When the validation loss is first as low; NaN if never."""
        return next((t for t, value in self.points if value <= loss), math.nan)


def rows(num: int, dim: int, seed: int) -> Tensor:
    """Pairs of a banana and its noise, mixed by a rotation, with mean 0 and sd 1."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num, dim, generator=generator)
    z[:, 1::2] = 0.3 * z[:, 1::2] + z[:, ::2].square() * torch.sign(z[:, :1])
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    x = z @ rotation
    return (x - x.mean(0)) / x.std(0)


def ours(
    name: str, train: Tensor, validation: Tensor, num_steps: int, batch: int, seed: int
) -> Curve:
    """`fit_density` with its defaults, without early stopping."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_layers": ARCHITECTURES[name], "hidden_dims": (HIDDEN, HIDDEN)}
    if name.startswith("nsf"):
        kind = "autoregressive" if name == "nsf-ar" else "coupling"
        options |= {"kind": kind, "linear": False, "num_bins": BINS, "bound": BOUND}
    make = {"realnvp": pf.flows.RealNVP, "maf": pf.flows.MAF}.get(name, pf.flows.NSF)
    density = make(train.shape[1], **options)
    points: list[tuple[float, float]] = []
    begin = time.process_time()

    def callback(state: Any) -> None:
        points.append((time.process_time() - begin, state.validation_losses[-1]))

    pf.fit_density(
        density, train, validation=validation, num_steps=num_steps, batch_size=batch, lr=LR, evaluate_every=EVERY,
        patience=None, seed=seed, progress=False, callback=callback,
    )  # fmt: skip
    total = time.process_time() - begin
    # One evaluation, timed apart, for the seconds of the steps alone.
    start = time.process_time()
    with torch.no_grad():
        for part in validation.split(512):
            density.log_prob(part)
    evaluating = (time.process_time() - start) * (len(points) + 1)
    return Curve(total - evaluating, points)


def zuko(
    name: str, train: Tensor, validation: Tensor, num_steps: int, batch: int, seed: int, lr: float
) -> Curve:
    """The loop of zuko's tutorial, with rows taken by an index, which is faster than a DataLoader."""
    torch.manual_seed(seed)
    flow = build(name, train.shape[1])["zuko"]()
    optimizer = torch.optim.Adam(flow.module.parameters(), lr=lr)
    points: list[tuple[float, float]] = []
    step, evaluating, begin = 0, 0.0, time.process_time()
    while step < num_steps:
        order = torch.randperm(len(train))
        for chosen in order[: len(train) // batch * batch].split(batch):
            loss = -flow.log_prob(train[chosen]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % EVERY == 0 or step == num_steps:
                start = time.process_time()
                with torch.no_grad():
                    parts = [flow.log_prob(part).sum() for part in validation.split(512)]
                value = -torch.stack(parts).sum().item() / len(validation)
                evaluating += time.process_time() - start
                points.append((time.process_time() - begin, value))
            if step == num_steps:
                break
    return Curve(time.process_time() - begin - evaluating, points)


def compare(name: str, num: int, options: argparse.Namespace) -> None:
    """Prints a line for each way to train."""
    dim = options.dim or SIZES[num]
    data = rows(num, dim, options.seed)
    train, validation = data[num // 10 :], data[: num // 10]
    ways: dict[str, Callable[[], Curve]] = {
        "fit_density": lambda: ours(
            name, train, validation, options.steps, options.batch, options.seed
        )
    }
    if "zuko" not in missing():
        for lr in (1e-3, LR):
            ways[f"zuko, lr {lr:g}"] = lambda lr=lr: zuko(
                name, train, validation, options.steps, options.batch, options.seed, lr
            )
    found: dict[str, Curve] = {}
    for _ in range(options.repeats):  # in turn, so that a busy machine slows all of them
        for way, run in ways.items():
            curve = run()
            if way not in found or curve.steps < found[way].steps:
                found[way] = curve
    goal = max(curve.best for curve in found.values()) + TOLERANCE
    for way, curve in found.items():
        print(
            f"{name:8} {num:6} x {dim}  {way:15} {1000 * curve.steps / options.steps:6.2f} ms a step, "
            f"best loss {curve.best:7.3f}, {curve.seconds_to(goal):6.1f} s to {goal:.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flows", nargs="+", choices=ARCHITECTURES, default=["nsf", "nsf-ar", "maf", "realnvp"])  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--dim", type=int, help="columns; by default 4 for 5000 rows, 8 for 30,000")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "zuko" in missing():
        print("zuko is not installed, and is left out: pip install zuko")
    for num in options.rows:
        for name in options.flows:
            compare(name, num, options)


if __name__ == "__main__":
    main()
