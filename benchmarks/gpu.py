"""The CUDA tests, and milliseconds a training step on a GPU, in one short script.

    python benchmarks/gpu.py                 everything, in about eight minutes
    python benchmarks/gpu.py --tiny          small sizes and few steps; also runs on a CPU, to check the script
    python benchmarks/gpu.py --no-tests      the timings alone

    Glow       32 x 32 x 3, 3 levels of 8 steps, batch 128: a step of Adam
    NSF, MAF   64 columns, batch 4096, against Pyro, zuko, nflows and normflows where they are installed
    VAE        784 pixels, 40 latents, IAF, batch 512: `SVI` with `AutoAmortizedFlow`
    CompiledSVI  eight schools by `AutoNormal`: CUDA graphs against `SVI`; with TF32 as torch has it

Every time is the median of some steps after warm-up, with the device synchronised before and after each; peak memory of the
device beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from peers import build
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_flows_ext as pf

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def timed(name: str, step: Callable[[], object], num_steps: int, warm: int = 5) -> float:
    """Prints milliseconds a step and the device's peak memory."""
    for _ in range(warm):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(num_steps):
        _synchronize()
        begin = time.perf_counter()
        step()
        _synchronize()
        seconds.append(time.perf_counter() - begin)
    ms = 1e3 * statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else float("nan")
    print(f"{name}: {ms:.2f} ms a step, peak {peak:.0f} MiB", flush=True)
    return ms


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def maximum_likelihood(
    module: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor
) -> Callable[[], object]:
    """A step of Adam on minus the mean log-density."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        # Another tensor at each step: caches of others go by the identity of the last one.
        (-log_prob(x.clone()).mean()).backward()
        optimizer.step()

    return step


def glow(tiny: bool, num_steps: int) -> None:
    size, levels, layers = (8, 2, 1) if tiny else (32, 3, 8)
    flow = pf.flows.Glow(
        (3, size, size), num_levels=levels, num_layers=layers, hidden_dims=(64, 64)
    )
    x = torch.randn(4 if tiny else 128, 3, size, size)
    flow.initialize(x)
    flow = flow.to(DEVICE)
    timed(
        f"Glow {size} x {size} x 3",
        maximum_likelihood(flow, flow.log_prob, x.to(DEVICE)),
        num_steps,
    )


def columns(tiny: bool, num_steps: int) -> None:
    dim, batch = (8, 32) if tiny else (64, 4096)
    x = torch.randn(batch, dim).to(DEVICE)
    for architecture in ("nsf", "maf"):
        ours = None
        for who, make in build(architecture, dim).items():
            torch.manual_seed(0)
            with torch.device(DEVICE):  # bases of others hold plain tensors
                flow = make()
            step = maximum_likelihood(flow.module.to(DEVICE), flow.log_prob, x)
            ms = timed(f"{architecture} of {dim}, {who}", step, num_steps)
            ours = ms if ours is None else ours
            if who != "ours":
                print(f"    {ms / ours:.2f} times ours")


def autoencoder(tiny: bool, num_steps: int) -> None:
    pixels, hidden, latents, batch = (16, 8, 2, 8) if tiny else (784, 400, 40, 512)
    decoder = nn.Sequential(nn.Linear(latents, hidden), nn.Softplus(), nn.Linear(hidden, pixels))
    encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Softplus(), nn.Linear(hidden, 64))
    decoder, encoder = decoder.to(DEVICE), encoder.to(DEVICE)
    x = (torch.rand(batch, pixels) < 0.2).float().to(DEVICE)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    guide = pf.AutoAmortizedFlow(model, encoder, flow="iaf")
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    timed("VAE with an IAF", lambda: svi.step(x), num_steps)


def compiled(tiny: bool, num_steps: int) -> None:
    y, sigma = Y.to(DEVICE), SIGMA.to(DEVICE)

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    times = {}
    for make in (SVI, pf.CompiledSVI):
        pyro.clear_param_store()
        svi = make(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        times[make] = timed(
            f"eight schools, {make.__name__}", lambda svi=svi: svi.step(y, sigma), num_steps
        )
    print(
        f"    {times[SVI] / times[pf.CompiledSVI]:.1f} times SVI; eager because of: {svi.fallback_reason}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    print(f"{name}, torch {torch.__version__}")
    if not options.no_tests:
        root = Path(__file__).parents[1]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-m",
            "cuda",
            str(root / "tests"),
        ]
        print(f"CUDA tests end with {subprocess.run(command, cwd=root, check=False).returncode}")
    for case in (glow, columns, autoencoder, compiled):
        torch.manual_seed(0)
        pyro.clear_param_store()
        try:
            case(options.tiny, 3 if options.tiny else 30)
        except Exception as error:  # time on such a machine is short: the other cases still run
            print(f"{case.__name__} failed: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
