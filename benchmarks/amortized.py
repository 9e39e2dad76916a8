"""Amortized posteriors against closed forms: 1000 data in a plate that subsamples 50, every posterior another.

    python benchmarks/amortized.py --output out

trains `AutoAmortizedFlow` with each kind of flow on z_n ~ N(0, I), x_n ~ N(W z_n, σ_n² I), where the noise σ_n differs
from datum to datum and is known, so that means, sds and correlations of the posteriors all depend on the datum. Prints,
from 5000 draws for every datum: how far the posterior means are off in posterior sds (on average over the data, and at the
worst datum), the ratio of the sds to the true ones, the error of the correlations, and, from 100, the gap between log p(x)
and the ELBO in nats a datum. Then the same for 1000 data that the guide has never seen.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.infer import fit

NUM_DATA, BATCH, DRAWS = 1000, 50, 5000
W = torch.tensor([[1.0, 0.8], [0.0, 1.0], [0.5, -0.2]])
FLOWS = {"Gaussian": None, "planar": "planar", "Sylvester": "sylvester", "IAF": "iaf"}
FLOWS |= {"RealNVP": "realnvp", "CIF": "cif"}


def model(x: Tensor, noise: Tensor, size: int | None = None) -> None:
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = noise[index].unsqueeze(-1)
        pyro.sample("x", dist.Normal(z @ W.mT, scale).to_event(1), obs=x[index])


def simulate(num: int) -> tuple[Tensor, Tensor]:
    noise = torch.empty(num).uniform_(0.3, 1.2)
    x = torch.randn(num, 2) @ W.mT
    return x + noise.unsqueeze(-1) * torch.randn(num, 3), noise


def posterior(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means `(N, 2)` and covariances `(N, 2, 2)` of z_n given x_n, and log p(x_n) `(N)`."""
    precision = torch.eye(2) + W.mT @ W / noise.square()[:, None, None]
    covariance = torch.linalg.inv(precision)
    mean = (covariance @ (x @ W).unsqueeze(-1)).squeeze(-1) / noise.square().unsqueeze(-1)
    marginal = W @ W.mT + noise.square()[:, None, None] * torch.eye(3)
    return mean, covariance, dist.MultivariateNormal(torch.zeros(3), marginal).log_prob(x)


@torch.no_grad()
def judge(guide: AutoAmortizedFlow, x: Tensor, noise: Tensor) -> dict[str, float]:
    mean, covariance, evidence = posterior(x, noise)
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    z = torch.cat([guide.sample_posterior(DRAWS // 50, x, noise)["z"] for _ in range(50)])
    off = (z.mean(0) - mean).abs() / sd
    ratio = z.std(0) / sd
    centred = (z - z.mean(0)) / z.std(0)
    correlation = (centred[..., 0] * centred[..., 1]).mean(0)
    true = covariance[:, 0, 1] / sd.prod(-1)
    elbo = Trace_ELBO(DRAWS // 50, max_plate_nesting=1, vectorize_particles=True)
    return {
        "mean off, average": off.mean().item(),
        "mean off, worst": off.max().item(),
        "sd off, average": (ratio - 1).abs().mean().item(),
        "sd ratio, least": ratio.min().item(),
        "sd ratio, greatest": ratio.max().item(),
        "correlation off, average": (correlation - true).abs().mean().item(),
        "gap": evidence.mean().item() + elbo.loss(model, guide, x, noise) / len(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--flows", nargs="*", default=list(FLOWS), choices=list(FLOWS))
    parser.add_argument("--output", type=Path, default=Path("benchmark-output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(0)
    train, new = simulate(NUM_DATA), simulate(NUM_DATA)
    results = {}
    for name in options.flows:
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        encoder = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        guide = AutoAmortizedFlow(model, encoder, flow=FLOWS[name], encoder_inputs=_inputs)
        start = time.perf_counter()
        fit(
            model,
            guide,
            *train,
            size=BATCH,
            num_steps=options.steps,
            lr=options.lr,
            num_particles=options.particles,
            progress=False,
        )
        seconds = time.perf_counter() - start
        results[name] = {
            "seconds": seconds,
            "train": judge(guide, *train),
            "new": judge(guide, *new),
        }
        for which in ("train", "new"):
            numbers = ", ".join(f"{k} {v:.3f}" for k, v in results[name][which].items())
            print(f"{name:10s} {which:5s} {numbers}, {seconds:.0f} s", flush=True)
    (options.output / "amortized.json").write_text(json.dumps(results, indent=2))


def _inputs(x: Tensor, noise: Tensor, size: int | None = None) -> Tensor:
    return torch.cat([x, noise.unsqueeze(-1)], -1)


if __name__ == "__main__":
    main()
