"""Where variational autoencoders lose their nats: the gaps of a decoder trained with a Gaussian posterior, and with a flow.

    python benchmarks/gaps.py --seeds 2 --output out
    PYRO_FLOWS_DATA=path/to/data python benchmarks/gaps.py --data caltech --latent 16 --num-data 50

Trains the autoencoder of `vae.py` with each posterior. Then, for test images, fits a factorised Gaussian and a flow to every
single one, and estimates log p(x): `diagnostics.gaps`. A decoder learns to have posteriors that its guide can follow: one that was
trained with a flow is expected to leave the best Gaussian of a datum below the amortized flow (Cremer, Li & Duvenaud 2018).
All in nats a datum, with standard errors over the data.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import pyro
from images import Images, parser, run_all
from vae import FLOWS, train, vae

from pyro_flows_ext.diagnostics import gaps
from pyro_flows_ext.diagnostics.gaps import InferenceGaps

COLUMNS = {
    "evidence": "log evidence",
    "amortized": "amortized",
    "gaussian": "Gaussian, each datum",
    "flow": "flow, each datum",
    "approximation_gaussian": "approximation gap, Gaussian",
    "approximation_flow": "approximation gap, flow",
    "amortization_gaussian": "amortized to Gaussian",
    "amortization_flow": "amortized to flow",
}


def run(name: str, images: Images, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    model, guide = vae(images.train, name, options.latent, options.hidden, options.features, seed)
    train(model, guide, images, options.steps, options.lr, seed)
    pyro.set_rng_seed(2000)
    start = time.perf_counter()
    x = images.test[: options.num_data]
    result = gaps(model, guide, x, ais_start="gaussian", ais_steps=200, max_steps=options.max_steps)
    seconds = time.perf_counter() - start
    print(f"{name}, seed {seed}, {seconds:.0f} s\n{result}\n", flush=True)
    estimates = {key: {"mean": e[0], "se": e[1]} for key, e in measure(result).items()}
    fits = {key: fit._asdict() for key, fit in result.fits.items()}
    row = {"posterior": name, "seed": seed, "by": result.best, "fits": fits, "seconds": seconds}
    return row | estimates


def measure(result: InferenceGaps) -> dict[str, tuple[float, float]]:
    """Mean and standard error over the data of every column."""
    bounds = {
        "evidence": result.log_evidence,
        "amortized": result.amortized,
        "gaussian": result.gaussian,
        "flow": result.flow,
    }
    measured = {k: (v.mean().item(), v.std().item() / len(v) ** 0.5) for k, v in bounds.items()}
    for family in ("gaussian", "flow"):
        measured[f"approximation_{family}"] = result.approximation_gap(family)
        measured[f"amortization_{family}"] = result.amortization_gap(family)
    return measured


def main() -> None:
    options = parser(
        __doc__,
        data="digits",
        posteriors=["Gaussian", "Sylvester"],
        seeds=1,
        steps=3000,
        latent=10,
        hidden=200,
        features=100,
    )
    options.add_argument("--num-data", type=int, default=100, help="test images looked at")
    options.add_argument("--max-steps", type=int, default=3000, help="of a local fit")
    rows, _ = run_all(run, options, FLOWS, "gaps")
    print("| trained with | seed | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for row in rows:
        cells = [f"{row[key]['mean']:.2f} ± {row[key]['se']:.2f}" for key in COLUMNS]
        print(f"| {row['posterior']} | {row['seed']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
