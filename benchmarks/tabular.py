"""Flow densities on real tables: ours beside zuko's and nflows' spline flows, at equal sizes and steps.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/tabular.py --seeds 2 --output benchmark-output
    PYRO_FLOWS_DATA=path/to/data python benchmarks/tabular.py --tables protein --flows NSF "NSF, zuko"

Autoregressive flows with two hidden layers of 128: 5 affine layers (MAF), 3 spline layers of 8 bins (RQ-NSF (AR)), and the
same spline layers with an index of two numbers a layer. All are trained by `fit_density` with the same settings: batches of
256, Adam from .002 by a cosine, the best step by the validation rows. Printed: test log-likelihood in nats of standardised
columns, ± its standard error over rows; for the indexed flow the importance-weighted bound with 100 particles, a lower bound.
Libraries that are not installed are left out. Writes tabular.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from peers import BINS, BOUND, HIDDEN, Flow, build
from torch import Tensor

from pyro_flows_ext.distributions import ContinuouslyIndexedFlow, Density
from pyro_flows_ext.infer import fit_density
from pyro_flows_ext.transforms import nsf

TABLES = {"power": "power_subset", "protein": "protein", "magic": "magic_gamma"}
NUM_PARTICLES, CHUNK = 100, 10


class Peer(Density):
    """Any library's flow, trained like ours."""

    def __init__(self, flow: Flow, dim: int):
        super().__init__(event_shape=torch.Size([dim]))
        self.module, self.flow = flow.module, flow

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flow.log_prob(value)


def indexed_nsf(dim: int) -> Density:
    """The spline layers with indices: p and q of two hidden layers of 50, s and t of two of 10."""
    layers = nsf(
        dim, kind="autoregressive", num_layers=3, linear=False, hidden_dims=(HIDDEN, HIDDEN),
        residual=False, activation=torch.nn.ReLU, num_bins=BINS, bound=BOUND,
    )  # fmt: skip
    return ContinuouslyIndexedFlow(dist.Normal(torch.zeros(dim), 1.0), layers, 2)


def _built(architecture: str, library: str) -> Callable[[int], Density]:
    return lambda dim: Peer(build(architecture, dim)[library](), dim)


FLOWS: dict[str, Callable[[int], Density]] = {
    "MAF": _built("maf", "ours"),
    "NSF": _built("nsf-ar", "ours"),
    "CIF-NSF": indexed_nsf,
    "NSF, zuko": _built("nsf-ar", "zuko"),
    "NSF, nflows": _built("nsf-ar", "nflows"),
}


def load(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows, standardised."""
    root = os.environ.get("PYRO_FLOWS_DATA")
    path = Path(root or ".") / "tabular" / f"{TABLES[name]}.npz"
    if not root or not path.is_file():
        raise FileNotFoundError(
            f"set PYRO_FLOWS_DATA to the folder that holds tabular/{TABLES[name]}.npz (now: {root!r})"
        )
    with np.load(path, allow_pickle=False) as arrays:
        train, validation, test = (torch.as_tensor(arrays[f"x_{p}"]) for p in ("train", "val", "test"))  # fmt: skip
    return train, validation, test


@torch.no_grad()
def score(density: Density, rows: Tensor) -> tuple[float, float]:
    """The mean log-likelihood, or its bound, and its standard error."""
    if isinstance(density, ContinuouslyIndexedFlow):
        parts = [density.log_prob_bound(r, NUM_PARTICLES, CHUNK) for r in rows.split(1000)]
    else:
        parts = [density.log_prob(r) for r in rows.split(1000)]
    values = torch.cat(parts)
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def run(table: str, flow: str, seed: int, steps: int) -> dict[str, Any]:
    train, validation, test = load(table)
    torch.manual_seed(seed)
    density = FLOWS[flow](train.shape[1])
    result = fit_density(
        density, train, validation=validation, num_steps=steps, lr=2e-3, patience=None, evaluate_every=steps // 10, seed=seed, progress=False
    )  # fmt: skip
    torch.manual_seed(1000)
    log_lik, se = score(density, test)
    return {
        "table": table,
        "flow": flow,
        "seed": seed,
        "log_likelihood": log_lik,
        "se": se,
        "parameters": sum(p.numel() for p in density.parameters()),
        "best_step": result.best_step,
        "skipped": result.skipped_steps,
        "seconds": result.seconds,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line a flow, a column a table: the mean over seeds, and their range."""
    tables = list(dict.fromkeys(row["table"] for row in rows))
    print("| flow | " + " | ".join(tables) + " |\n" + "|---" * (len(tables) + 1) + "|")
    for flow in dict.fromkeys(row["flow"] for row in rows):
        cells = []
        for table in tables:
            values = [row["log_likelihood"] for row in rows if (row["flow"], row["table"]) == (flow, table)]  # fmt: skip
            cells.append(f"{statistics.mean(values):.3f} ({', '.join(f'{v:.2f}' for v in values)})" if values else "–")  # fmt: skip
        print(f"| {flow} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="folder for tabular.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for table in options.tables:
        for flow in options.flows:
            for seed in range(options.seeds):
                try:
                    row = run(table, flow, seed, options.steps)
                except FileNotFoundError as error:
                    parser.error(str(error))
                except KeyError as missing:
                    print(f"{flow}: {missing} is not installed")
                    break
                rows.append(row)
                print(
                    f"{table:8s} {flow:12s} {seed}  {row['log_likelihood']:8.3f} ± {row['se']:.3f}  {row['parameters']} parameters  "
                    f"best at step {row['best_step']}  {row['seconds']:.0f} s",
                    flush=True,
                )
                if options.output:
                    options.output.mkdir(parents=True, exist_ok=True)
                    (options.output / "tabular.json").write_text(json.dumps(rows, indent=1))
    print_table(rows)


if __name__ == "__main__":
    main()
