"""What the processes of the tests run: `python processes.py SCENARIO FOLDER`, alone or under `torchrun`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_flows_ext.distributions import Dequantized, FlowDistribution
from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import fit, fit_density
from pyro_flows_ext.transforms import glow_vector, realnvp

D, N = 4, 203


def rows():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=generator)
    return x + 0.5 * x.roll(1, 1).square()


def density(preset=realnvp, seed=0):
    torch.manual_seed(seed)
    flow = preset(D, num_layers=2, hidden_dims=(16,))
    return FlowDistribution(dist.Normal(torch.zeros(D), 1.0).to_event(1), flow)


def table(folder, **options):
    options = {"num_steps": 20, "batch_size": 32, "evaluate_every": 5, "seed": 0, **options}
    model = density()
    return model, fit_density(model, rows(), progress=False, **options)


def actnorm(folder):
    """Parameters that differ by process before the start, and starts that depend on data."""
    model = density(glow_vector, seed=int(os.environ.get("RANK", "0")))
    options = {"num_steps": 8, "batch_size": 31, "standardize": True, "evaluate_every": 4}
    torch.manual_seed(0)
    return model, fit_density(model, 100 * rows() + 3, progress=False, **options)


def weights(folder):
    generator = torch.Generator().manual_seed(2)
    model = density()
    torch.manual_seed(0)
    given = {"weights": torch.rand(N, generator=generator), "validation": rows()[:50]}
    return model, fit_density(model, rows(), progress=False, num_steps=10, batch_size=33, **given)


class Squares(Dataset):
    """Remembers what is read of it."""

    def __init__(self):
        self.values, self.read = rows(), []

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        self.read.append(i)
        return self.values[i]


def dataset(folder):
    data = Squares()
    model = density()
    options = {"num_steps": 6, "batch_size": 32, "validation": None, "standardize": False}
    result = fit_density(model, data, progress=False, seed=0, **options)
    (folder / f"read-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(len(data.read)))
    return model, result


def sampler(folder):
    """A loader that gives every process rows of its own, in a group that the user set up."""
    torch.distributed.init_process_group("gloo")
    model = density()
    data = TensorDataset(rows())
    loader = DataLoader(
        data,
        16,
        sampler=DistributedSampler(data, seed=3),
        collate_fn=lambda b: torch.stack([x for (x,) in b]),
    )
    return model, fit_density(model, loader, validation=None, num_steps=10, progress=False, seed=0)


def noise(folder):
    """Every process draws noise of its own."""
    model = Dequantized(density(), num_levels=8)
    x = (rows().abs() * 2).clamp(max=7).floor()
    result = fit_density(model, x, num_steps=10, batch_size=32, progress=False, seed=0)
    (folder / f"draws-{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps(torch.rand(3).tolist())
    )
    return model, result


def infinite(folder):
    """One process's part of some batches has no finite loss."""
    model = density()
    calls = [0]
    objective = model.objective

    def broken(value):
        calls[0] += 1
        bad = calls[0] in (3, 4) and os.environ.get("RANK", "0") == "1"
        return objective(value) * (torch.nan if bad else 1.0)

    model.objective = broken
    return model, fit_density(model, rows(), validation=None, num_steps=6, progress=False, seed=0)


def stopped(folder):
    def callback(state):
        state.stop = os.environ.get("RANK", "0") == "1" and state.step >= 10

    return table(folder, callback=callback)


def half(folder):
    """Ends in the middle, and leaves a checkpoint."""

    def callback(state):
        state.stop = state.step >= 10

    return table(folder, callback=callback, checkpoint=folder / "run.pt")


def resumed(folder):
    return table(folder, checkpoint=folder / "run.pt", resume=True)


def killed(folder):
    """The second process is killed as soon as there is a checkpoint."""

    def callback(state):
        if os.environ.get("RANK", "0") == "1" and (folder / "run.pt").exists():
            (folder / "killed.json").write_text(json.dumps([time.time(), state.step]))
            os.kill(os.getpid(), signal.SIGKILL)

    options = {"checkpoint": folder / "run.pt", "patience": None, "num_steps": 10**6}
    return table(folder, callback=callback, **options)


def revived(folder):
    """Goes on from that checkpoint, to the next evaluation."""

    def callback(state):
        state.stop = True

    options = {"checkpoint": folder / "run.pt", "patience": None, "num_steps": 10**6}
    return table(folder, callback=callback, resume=True, **options)


def other(folder):
    """Arguments that differ."""
    return table(folder, batch_size=32 + int(os.environ.get("RANK", "0")))


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def posterior(folder):
    """`fit` of a flow guide in rounds, from a cold start."""
    guide = AutoIAF(model, hidden_dims=(8,))
    y = torch.randn(20, 3, generator=torch.Generator().manual_seed(3)) + 1
    result = fit(model, guide, y, max_steps=600, warm_start=False, progress=False, seed=0)
    mean = result.sample(2000)["mu"].mean(0)
    torch.testing.assert_close(mean, y.sum(0) / (len(y) + 0.25), atol=0.1, rtol=0)
    return guide, result


def batches(folder):
    """`fit` of a normal guide, on mini-batches that each process draws by itself."""
    y = torch.randn(60, 3, generator=torch.Generator().manual_seed(3)) + 1

    def model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", len(y), subsample_size=10) as index:
            pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y[index])
            drawn.append(index.tolist())

    drawn = []
    guide = AutoNormal(model)
    result = fit(model, guide, y, num_steps=30, progress=False, seed=0)
    (folder / f"drawn-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(drawn))
    return guide, result


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    model, result = globals()[name](folder)
    rank = os.environ.get("RANK", "0")
    if rank == "1":
        # Written by name, so that a test reads both.
        name = f"{name}-1"
    found = {
        "losses": result.losses.tolist(),
        "validation": getattr(result, "validation_losses", torch.empty(0)).tolist(),
        "parameters": sum(p.double().sum().item() for p in model.parameters()),
        "skipped": result.skipped_steps,
        "steps": result.steps,
    }
    (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
