"""Variational autoencoders whose posterior is a Gaussian, a planar flow or a Sylvester flow, by their bounds on test images.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/vae.py --data caltech --output out
    python benchmarks/vae.py --data digits --latent 10 --steps 2000

z ~ N(0, I), x ~ Bernoulli(decoder(z)), networks with two hidden layers; `AutoAmortizedFlow` reads the posterior's parameters
off the encoder. Same networks, same start of the networks, same steps for all: Adam on batches of 100, the KL term warmed
up over the first fifth, the rate falling to nothing by a cosine, and of the parameters on the way those with the best ELBO on
validation images. For each posterior and seed: the ELBO, and the importance-weighted bound with K draws a datum, in nats an
image, on the test images, and the ELBO on those trained on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from images import Images, parser, run_all
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.infer import AnnealedELBO, ImportanceWeightedELBO, linear

FLOWS: dict[str, dict[str, Any]] = {
    "Gaussian": {"flow": None},
    "planar": {"flow": "planar", "num_layers": 8},
    "Sylvester": {"flow": "sylvester", "num_layers": 4},
    "IAF": {"flow": "iaf", "num_layers": 2},
}
BATCH = 100
# Steps between two looks at the validation images.
LOOK = 100
Model = Callable[..., None]


def vae(
    x: Tensor, name: str, latent: int, hidden: int, features: int, seed: int
) -> tuple[Model, AutoAmortizedFlow]:
    """Model and guide, untrained."""
    pyro.set_rng_seed(seed)
    encoder, decoder = networks(x, latent, hidden, features)
    model = program(decoder, dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
    return model, AutoAmortizedFlow(model, encoder, init_scale=0.5, **FLOWS[name])


def networks(x: Tensor, latent: int, hidden: int, features: int) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder.

    Means of the pixels are where both start: the bias of the decoder, and what the encoder takes off.
    """
    pixels, mean = x.shape[-1], x.mean(0)
    decoder = nn.Sequential(
        nn.Linear(latent, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        last := nn.Linear(hidden, pixels),
    )
    encoder = nn.Sequential(
        first := nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, features), nn.ReLU()
    )
    with torch.no_grad():
        last.bias.copy_(mean.clamp(0.01, 0.99).logit())
        first.bias.sub_(first.weight @ mean)
    return encoder, decoder


def program(decoder: nn.Module, prior: Any) -> Model:
    """z ~ prior, x ~ Bernoulli(decoder(z)): `model(x, size)` takes `size` of the rows of x, or all."""

    def model(x: Tensor, size: int | None = None) -> None:
        pyro.module("decoder", decoder)
        if isinstance(prior, nn.Module):
            pyro.module("prior", prior)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[index])

    return model


def train(
    model: Model, guide: AutoAmortizedFlow, images: Images, steps: int, lr: float, seed: int
) -> int:
    """Trains both, and takes them back to where their ELBO on the validation images was best; says which step that was."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide.setup(images.train, BATCH)
    elbo = AnnealedELBO(Trace_ELBO(), linear(max(1, steps // 5)), term="kl")
    parameters = _parameters(model, guide, images.train)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_step, kept = -math.inf, 0, [p.detach().clone() for p in parameters]
    with pyro.validation_enabled(False):
        for step in range(1, steps + 1):
            elbo.loss_and_grads(model, guide, images.train, BATCH)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if elbo.beta < 1 or (step % LOOK and step < steps):
                continue
            value = bound(model, guide, images.validation[:1000], 1)
            if value > best:
                best, best_step, kept = value, step, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, good in zip(parameters, kept, strict=True):
            parameter.copy_(good)
    return best_step


def _parameters(model: Model, guide: AutoAmortizedFlow, x: Tensor) -> list[Tensor]:
    """What the store has of them, unconstrained."""
    with torch.no_grad(), poutine.trace(param_only=True) as capture:
        Trace_ELBO().loss(model, guide, x, BATCH)
    sites: list[Any] = list(capture.trace.nodes.values())
    return [site["value"].unconstrained() for site in sites]


def bound(model: Model, guide: AutoAmortizedFlow, x: Tensor, num_particles: int) -> float:
    """log 1/K Σ_k p(x_n, z_k) / q(z_k | x_n), K = `num_particles`, mean over the rows x_n; nats."""
    elbo = ImportanceWeightedELBO(num_particles, max_plate_nesting=1)
    return -sum(elbo.loss(model, guide, rows) for rows in x.split(50)) / len(x)


def run(name: str, images: Images, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    model, guide = vae(images.train, name, options.latent, options.hidden, options.features, seed)
    start = time.perf_counter()
    best_step = train(model, guide, images, options.steps, options.lr, seed)
    seconds = time.perf_counter() - start
    pyro.set_rng_seed(1000)
    test = images.test[: options.num_test]
    row = {
        "posterior": name,
        "seed": seed,
        "elbo": bound(model, guide, test.repeat(10, 1), 1),
        "iwae": bound(model, guide, test, options.particles),
        "train_elbo": bound(model, guide, images.train[: len(test)].repeat(10, 1), 1),
        "best_step": best_step,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in guide.parameters()),
    }
    print(
        f"{name:10s} seed {seed}  test ELBO {row['elbo']:8.2f}  IWAE {row['iwae']:8.2f}  "
        f"train ELBO {row['train_elbo']:8.2f}  best at step {best_step}  {seconds:5.0f} s",
        flush=True,
    )
    return row


def main() -> None:
    options = parser(
        __doc__,
        data="caltech",
        posteriors=list(FLOWS)[:3],
        seeds=3,
        steps=2000,
        latent=32,
        hidden=128,
        features=64,
    )
    options.add_argument("--particles", type=int, default=200, help="K of the weighted bound")
    options.add_argument("--num-test", type=int, default=1000, help="test images looked at")
    rows, chosen = run_all(run, options, FLOWS, "vae")
    table(rows, chosen.particles)


def table(rows: list[dict[str, Any]], particles: int) -> None:
    """Mean over seeds ± their standard deviation."""
    columns = {"elbo": "ELBO", "iwae": f"IWAE, K = {particles}", "train_elbo": "ELBO, training"}
    print("| posterior | " + " | ".join(columns.values()) + " | s |")
    print("|---" * (len(columns) + 2) + "|")
    for name in dict.fromkeys(row["posterior"] for row in rows):
        mine = [row for row in rows if row["posterior"] == name]
        cells = []
        for key in columns:
            values = [row[key] for row in mine]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        seconds = statistics.mean(row["seconds"] for row in mine)
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
