"""The table of Bekasov & Murray (2020): linear flows of a 3-D normal, with and without nested dropout.

    python benchmarks/nested_dropout.py --seeds 5

Data: 10,000 training and 10,000 test points of a normal with variances 1, .1, .01, rotated at random. Flows: QR with three
Householder reflections, LU with a random fixed permutation; the star has nested dropout (λ = 20, p = .33). Printed: mean
and two standard deviations over seeds of the mean squared error by element from the first two latents and from the first,
and of the test log-likelihood less that of the true density.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows_ext.distributions import NestedDropoutFlow
from pyro_flows_ext.transforms import FlowTransform, LULinear, QRLinear

VARIANCES = (1.0, 0.1, 0.01)
WEIGHT, PROB = 20.0, 0.33
NUM_DATA, BATCH = 10_000, 500


def make_flow(kind: str, weight: float) -> NestedDropoutFlow:
    """One of the paper's linear flows; `weight` 0 is the same without nested dropout."""
    if kind == "QR":
        linear: FlowTransform = QRLinear(3, num_reflections=3, bias=False)
    else:
        linear = LULinear(3, bias=False, permute=True)
    with torch.no_grad():  # a start of its own for each seed
        for p in linear.parameters():
            p.add_(0.3 * torch.randn_like(p))
    base = dist.Normal(torch.zeros(3), 1.0)
    return NestedDropoutFlow(base, linear, index_prob=PROB, reconstruction_weight=weight)


def train(flow: NestedDropoutFlow, data: Tensor, steps: int) -> None:
    """Adam, its rate from .01 to 0 by a cosine."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = data[torch.randint(len(data), (BATCH,))]
        optimizer.zero_grad()
        (-flow.objective(rows).mean()).backward()
        optimizer.step()
        schedule.step()


def run(kind: str, nested: bool, seed: int, steps: int) -> dict[str, float | str]:
    """One row: errors and likelihood on the test points."""
    torch.manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    truth = dist.MultivariateNormal(
        torch.zeros(3), rotation @ torch.diag(torch.tensor(VARIANCES)) @ rotation.T
    )
    train_data, test_data = truth.sample((2, NUM_DATA))
    flow = make_flow(kind, WEIGHT if nested else 0.0)
    start = time.perf_counter()
    train(flow, train_data, steps)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        gap = flow.log_prob(test_data).mean() - truth.log_prob(test_data).mean()
    one, two = flow.reconstruction_curve(test_data, [1, 2]).tolist()
    name = kind + ("*" if nested else "")
    return {"flow": name, "seed": seed, "mse2": two, "mse1": one, "gap": gap.item(), "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path, help="folder for nested_dropout.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(
        "| flow | MSE(2) | MSE(1) | log-likelihood - true density's | seconds |\n|---|---|---|---|---|"
    )
    print(f"| optimum | {sum(VARIANCES[2:]) / 3:.4f} | {sum(VARIANCES[1:]) / 3:.4f} | 0 | |")
    for kind in ("QR", "LU"):
        for nested in (False, True):
            mine = [run(kind, nested, seed, options.steps) for seed in range(options.seeds)]
            rows += mine
            cells = []
            for name in ("mse2", "mse1", "gap"):
                values = torch.tensor([float(row[name]) for row in mine])
                spread = 2 * values.std().item() if len(mine) > 1 else float("nan")
                cells.append(f"{values.mean():.4f} ± {spread:.4f}")
            seconds = sum(float(row["seconds"]) for row in mine) / len(mine)
            print(f"| {mine[0]['flow']} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "nested_dropout.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
