"""Side-by-side timings of transforms against other libraries, in one run.

    python benchmarks/transforms.py --output benchmark-output
    python benchmarks/transforms.py --only realnvp maf

At D = 64 and a batch of 1024, eagerly, it times

    planar, sylvester    `rsample`, `log_prob` of the sample, and the gradient of both, of 16 layers against Pyro's
    realnvp, maf, nsf    `log_prob` of data and its gradient, against every library of `peers.py` that is installed
    nsf-ar               the same, with autoregressive splines
    sample maf, nsf-ar   sampling; ours after `--steps` of training on scikit-learn's digits, since its time depends on
                         what was learned: the other libraries take D passes a layer whatever the weights are

All candidates are run in turn, many times over, so that a busy machine slows all of them alike. Times are CPU seconds of all
threads; a turn runs once untimed, to fill the caches, and then `--steps-a-turn` times. A ratio is the median over the
rounds of the fastest other library's time by ours, so above 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from peers import ARCHITECTURES, Flow, build, missing
from pyro.distributions import transforms as stock
from torch import Tensor

from pyro_flows_ext.transforms import planar, sylvester

DIM, BATCH, LAYERS = 64, 1024, 16
Run = Callable[[], object]


# --- what is run ---


def stacked(name: str) -> dict[str, Run]:
    """16 planar or Sylvester layers, one by one and in one stack."""
    if name == "planar":
        candidates = {
            "pyro": [stock.planar(DIM) for _ in range(LAYERS)],
            "ours": [planar(DIM) for _ in range(LAYERS)],
            "ours, one stack": [planar(DIM, num_layers=LAYERS)],
        }
    else:
        candidates = {
            "pyro": [stock.sylvester(DIM) for _ in range(LAYERS)],
            "ours": [sylvester(DIM) for _ in range(LAYERS)],
            "ours, one stack": [sylvester(DIM, num_layers=LAYERS)],
            "ours, rank 8": [sylvester(DIM, rank=8) for _ in range(LAYERS)],
            "ours, rank 8, one stack": [sylvester(DIM, rank=8, num_layers=LAYERS)],
        }
    return {who: variational_step(transforms) for who, transforms in candidates.items()}


def variational_step(transforms: list) -> Run:
    """One `rsample`, `log_prob` and gradient."""
    base = dist.Normal(torch.zeros(DIM), torch.ones(DIM)).to_event(1)
    flow = dist.TransformedDistribution(base, transforms)
    parameters = [p for t in transforms for p in t.parameters()]

    def run() -> None:
        z = flow.rsample((BATCH,))
        (flow.log_prob(z).mean() - z.square().mean()).backward()
        for p in parameters:
            p.grad = None

    return run


def densities(architecture: str) -> dict[str, Run]:
    """`log_prob` of one batch and its gradient, by library."""
    x = torch.randn(BATCH, DIM)
    return {who: likelihood_step(make(), x) for who, make in build(architecture, DIM).items()}


def likelihood_step(flow: Flow, x: Tensor) -> Run:
    def run() -> None:
        # A new tensor every time: a cached pass is not what is timed.
        (-flow.log_prob(x.clone()).mean()).backward()
        for p in flow.module.parameters():
            p.grad = None

    return run


def samplers(architecture: str, steps: int) -> dict[str, Run]:
    """Sampling one batch, by library."""
    flows = {who: make() for who, make in build(architecture, DIM).items()}
    train_on_digits(flows["ours"], steps)
    return {who: sampler(flow) for who, flow in flows.items()}


def sampler(flow: Flow) -> Run:
    return torch.no_grad()(lambda: flow.sample(BATCH))


def train_on_digits(flow: Flow, steps: int) -> None:
    """Maximum likelihood on scikit-learn's digits, dequantized anew in every batch, by their logits."""
    from sklearn.datasets import load_digits

    digits = torch.as_tensor(load_digits().data, dtype=torch.get_default_dtype())
    train, test = digits[:1500], digits[1500:]

    def dequantized(x: Tensor) -> Tensor:
        return (0.05 + 0.9 * (x + torch.rand_like(x)) / 17).logit()

    optimizer = torch.optim.Adam(flow.module.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = dequantized(train[torch.randint(len(train), (256,))])
        optimizer.zero_grad()
        (-flow.log_prob(batch).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.module.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        loss = -flow.log_prob(dequantized(test)).mean().item()
    print(f"trained for {steps} steps: {loss:.2f} nats on held-out digits")


# --- how it is timed ---


def timed(group: str, runs: dict[str, Run], repeats: int, steps: int) -> list[dict]:
    """One row a candidate: milliseconds, and how many times faster than the fastest of the others ours is."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {who: [] for who in runs}
    for _ in range(repeats):
        for who, run in runs.items():
            if steps > 1:
                run()
            start = time.process_time()
            for _ in range(steps):
                run()
            times[who].append((time.process_time() - start) / steps)
    medians = {who: statistics.median(t) for who, t in times.items()}
    others = [who for who in runs if not who.startswith("ours")]
    rows = []
    for who in runs:
        row = {"group": group, "candidate": who, "ms": 1e3 * medians[who]}
        if who.startswith("ours") and others:
            best = min(others, key=medians.__getitem__)
            # Within each round, both ran within a second of each other.
            ratios = [a / b for a, b in zip(times[best], times[who], strict=True)]
            row |= {"against": best, "times faster": statistics.median(ratios)}
        rows.append(row)
        verdict = f"  {row['times faster']:6.2f}x {row['against']}" if "against" in row else ""
        print(f"{group:14s} {who:26s} {row['ms']:10.2f} ms{verdict}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups: dict[str, Callable[[], dict[str, Run]]] = {
        "planar": lambda: stacked("planar"),
        "sylvester": lambda: stacked("sylvester"),
        **{name: lambda name=name: densities(name) for name in ARCHITECTURES},
        **{
            f"sample {name}": lambda name=name: samplers(name, options.steps)
            for name in ("maf", "nsf-ar")
        },
    }
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups), metavar="GROUP")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--sampling-repeats", type=int, default=5)
    parser.add_argument("--steps-a-turn", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500, help="of training before sampling")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for transforms.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if absent := missing():
        print("not installed, left out:", *absent)
    rows = []
    for name in options.only:
        runs = groups[name]()
        pyro.enable_validation(False)  # the same for all: importing zuko turns torch's off
        repeats = options.sampling_repeats if name.startswith("sample") else options.repeats
        steps = 1 if name.startswith("sample") else options.steps_a_turn
        rows += timed(name, runs, repeats, steps)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "transforms.json").write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
