"""`AutoAmortizedFlow` over 10⁵ and 10⁶ local latents in a memory-mapped file: memory, seconds an epoch, error of means.

    python benchmarks/million_latents.py --folder /var/tmp

z_n ~ N(0, I) in two dimensions, x_n ~ N(W z_n, σ² I) in four, all in a file of float32 numbers. The encoder is a perceptron, the
guide a Gaussian for each datum, whose mean and scale it computes. Each size trains for `--epochs` of mini-batches of
`--batch` rows, and prints the peak of resident memory over that before the fit, CPU seconds an
epoch, and the error of the posterior means in posterior sds, over 10⁵ data, against the closed form.

    by argument   the loop of the user passes the rows of each mini-batch, in a new order each epoch, as `x` and `index`
    by subsample  `fit` with `subsample_size`: the plate draws a mini-batch at each step
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from memory_map import reset_peak, status
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_flows_ext as pf

W = torch.tensor([[1.0, 0.8], [0.0, 1.0], [0.5, -0.2], [-0.6, 0.3]])
NOISE, CHUNK = 0.5, 100_000


def make(path: Path, num: int) -> None:
    """Data drawn from the model, written in chunks."""
    if path.exists():
        return
    generator = torch.Generator().manual_seed(0)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num, len(W)))
    for start in range(0, num, CHUNK):
        part = rows[start : start + CHUNK]
        z = torch.randn(len(part), 2, generator=generator)
        part[:] = (z @ W.mT + NOISE * torch.randn(len(part), len(W), generator=generator)).numpy()
    rows.flush()


def model(x: Tensor, num: int, size: int | None = None, index: Tensor | None = None) -> None:
    """`x`: all data, of which `size` are drawn; or the rows of `index` alone."""
    with pyro.plate("data", num, subsample_size=size, subsample=index) as drawn:
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        rows = x[drawn] if index is None else x
        pyro.sample("x", dist.Normal(z @ W.mT, NOISE).to_event(1), obs=rows)


def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means `(N, 2)` and sds `(2)` of z_n given x_n."""
    covariance = torch.linalg.inv(torch.eye(2) + W.mT @ W / NOISE**2)
    return x @ W @ covariance / NOISE**2, covariance.diagonal().sqrt()


def by_argument(x: Tensor, guide: pf.AutoAmortizedFlow, batch: int, num_epochs: int) -> None:
    """A loop over shuffled mini-batches, with the rate of Adam falling to a hundredth."""
    num_steps = num_epochs * (len(x) // batch)
    decay = {
        "optimizer": torch.optim.Adam,
        "optim_args": {"lr": 2e-2},
        "gamma": 0.01 ** (1 / num_steps),
    }
    scheduler = pyro.optim.ExponentialLR(decay)
    svi = SVI(model, guide, scheduler, Trace_ELBO())
    with pyro.validation_enabled(False):
        for _ in range(num_epochs):
            for index in torch.randperm(len(x)).split(batch):
                if len(index) == batch:
                    svi.step(x[index], len(x), index=index)
                    scheduler.step()


def by_subsample(x: Tensor, guide: pf.AutoAmortizedFlow, batch: int, num_epochs: int) -> None:
    """`fit` on the mapped data."""
    options = {"num_particles": 1, "lr": 2e-2, "compile": False, "progress": False}
    num_steps = num_epochs * (len(x) // batch)
    pf.fit(model, guide, x, len(x), size=batch, num_steps=num_steps, **options)


def train(path: Path, how: str, batch: int, num_epochs: int) -> None:
    """Trains in this process, and prints what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        x = torch.from_numpy(np.load(path, mmap_mode="r"))
    encoder = nn.Sequential(nn.Linear(len(W), 32), nn.Softplus(), nn.Linear(32, 16))
    guide = pf.AutoAmortizedFlow(model, encoder, flow=None)
    run = {"argument": by_argument, "subsample": by_subsample}[how]
    # Everything that a first step loads, on parameters that are then those of the run.
    run(x[: 2 * batch].clone(), guide, batch, 1)
    reset_peak()
    before = status("VmHWM")
    wall, cpu = time.perf_counter(), time.process_time()
    run(x, guide, batch, num_epochs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak, mapped = status("VmHWM"), status("RssFile")
    rows = x[:CHUNK].clone()
    mean, sd = posterior(rows)
    with torch.no_grad():
        draws = guide.sample_posterior(2, rows, len(rows))["z"]
        # The Gaussian of a datum has its mean where the noise is zero.
        own = guide.transform.condition(guide.encoder(rows))(torch.zeros_like(mean))
    off = (own - mean).abs() / sd
    spread = (draws[0] - draws[1]).std(0) / 2**0.5 / sd
    print(
        f"{len(x)} data by {how}, batches of {batch}: peak {peak - before:.0f} MiB over {before:.0f} ({mapped:.0f} MiB of files "
        f"mapped at the end), {cpu / num_epochs:.1f} CPU s and {wall / num_epochs:.1f} s of the clock an epoch; means off by {off.mean():.4f} sds on average, "
        f"{off.max():.3f} at worst, sd ratio {spread.min():.3f} to {spread.max():.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--data", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--how", nargs="+", default=["argument", "subsample"])
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    for num in options.data:
        path = options.folder / f"latents-{num}.npy"
        make(path, num)
        for how in options.how:
            pyro.clear_param_store()
            train(path, how, options.batch, options.epochs)


if __name__ == "__main__":
    main()
