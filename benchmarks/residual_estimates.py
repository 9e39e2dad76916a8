"""Residual flows trained by the unbiased estimate of the log-det, and by the exact one (Chen et al. 2019).

    python benchmarks/residual_estimates.py --data moons digits --seeds 2 --output benchmark-output

`moons`: ten pairs of coordinates, each a draw of two moons, rotated: 20 dimensions, entropy known. `digits` (64), `parkinsons_voice` (11) and
other tables by name: `tabular/` in the folder named by PYRO_FLOWS_DATA. The same initial values, batches and steps for three
ways to train: `estimate` (two terms and Russian roulette, one probe, gradients by the Neumann series), `truncated` (the
first five terms and no more, which is biased) and `exact`. All are scored by the exact determinant, on data not
trained on. Printed: mean log-likelihood in nats, CPU seconds of training, and for each the mean and the sd by
row of the estimate in eval mode less the exact log-likelihood. Writes residual_estimates.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows_ext.distributions import TOYS, FlowDistribution
from pyro_flows_ext.ops import log_det_series
from pyro_flows_ext.transforms import ActNorm, ResidualFlow


class Truncated(ResidualFlow):
    """The power series of the log-det cut after five terms: biased."""

    def _ladj(self, product: Any, x: Tensor) -> Tensor:
        v = self.draw_noise(x).v
        return log_det_series(product, v, (1.0,) * 5, 1)


WAYS: dict[str, tuple[type[ResidualFlow], dict[str, Any]]] = {
    "estimate": (ResidualFlow, {"exact_log_det": False}),
    "truncated": (Truncated, {"exact_log_det": False}),
    "exact": (ResidualFlow, {"exact_log_det": True}),
}


def load(name: str) -> tuple[Tensor, Tensor, float]:
    """Training and test rows, and the entropy where it is known."""
    if name == "moons":
        torch.manual_seed(0)
        points = TOYS["moons"].sample(10 * 12_000).reshape(12_000, 20)
        spread = points.std(0)
        Q = torch.linalg.qr(torch.randn(20, 20))[0]
        rows = (points - points.mean(0)) / spread @ Q
        entropy = 10 * TOYS["moons"].entropy - spread.log().sum().item()
        return rows[:10_000], rows[10_000:], entropy
    root = os.environ.get("PYRO_FLOWS_DATA")
    file = Path(root or ".") / "tabular" / f"{name}.npz"
    if not root or not file.is_file():
        raise SystemExit(
            f"set PYRO_FLOWS_DATA to the folder that holds tabular/{name}.npz (now: {root!r})"
        )
    with np.load(file, allow_pickle=False) as arrays:
        train, test = (torch.as_tensor(arrays[k]).float() for k in ("x_train", "x_test"))
    # Digits have columns that are nearly constant, with outliers of 20 sds.
    low, high = train.quantile(0.001, 0), train.quantile(0.999, 0)
    inside = ((test >= low) & (test <= high)).all(-1)
    return train, test[inside] if name == "digits" else test, float("nan")


def make(way: str, dim: int, layers: int, width: int) -> FlowDistribution:
    cls, options = WAYS[way]
    parts: list[Any] = []
    for _ in range(layers):
        parts += [cls(dim, (width, width), **options).inv, ActNorm(dim)]
    return FlowDistribution(dist.Normal(torch.zeros(dim), 1.0).to_event(1), parts)


def run(way: str, seed: int, data: tuple[Tensor, Tensor, float], options: Any) -> dict[str, Any]:
    train, test, entropy = data
    torch.manual_seed(seed)
    flow = make(way, train.shape[1], options.layers, options.width)
    optimizer = torch.optim.Adam(flow.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    batches = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(options.steps):
        rows = train[torch.randint(len(train), (options.batch,), generator=batches)]
        optimizer.zero_grad()
        (-flow.log_prob(rows).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 20.0)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    flow.eval()
    scored = {}
    for other in ("exact", "estimate"):
        same = make(other, train.shape[1], options.layers, options.width).eval()
        same.load_state_dict(flow.state_dict())
        with torch.no_grad():
            scored[other] = torch.cat([same.log_prob(x) for x in test.split(500)])
    exact, error = scored["exact"], scored["estimate"] - scored["exact"]
    return {"way": way, "seed": seed, "ll": exact.mean().item(), "se": exact.std().item() / len(exact) ** 0.5, "error": error.mean().item(), "error se": error.std().item() / len(error) ** 0.5, "error sd": error.std().item(), "entropy": entropy, "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["moons"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--output", type=Path, help="folder for the .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.data:
        data = load(name)
        for seed in range(options.seeds):
            for way in options.ways:
                row = {"data": name, **run(way, seed, data, options)}
                rows.append(row)
                print(f"{name} {way:10s} seed {seed}  {row['ll']:.2f} ± {row['se']:.2f} nats (minus entropy {-row['entropy']:.2f})   estimate less exact {row['error']:.3f} ± {row['error se']:.3f}, sd {row['error sd']:.2f}   {row['seconds']:.0f} s", flush=True)  # fmt: skip
                if options.output:
                    options.output.mkdir(parents=True, exist_ok=True)
                    path = options.output / "residual_estimates.json"
                    path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
