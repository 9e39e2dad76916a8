"""kill -9 at random steps of a checkpointed `fit`: does the resumed run end at the losses of one that was not stopped?

    python benchmarks/kill_resume.py --times 20

Eight schools, `AutoIAF`: a fixed run of 200 steps, and rounds until a bar that is out of reach. Each time the process kills itself by
SIGKILL at a random step, anywhere, is resumed from its checkpoint, killed once more at a later random step, and resumed
to the end. Losses must be equal to the last bit. Prints a line a run; the exit status is 1 where any differs.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import signal
import tempfile
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import fit
from pyro_flows_ext.infer.training.trainer import Trainer

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
NUM_STEPS = 200
KINDS: dict[str, dict[str, Any]] = {
    "num_steps": {"num_steps": NUM_STEPS},
    "rounds": {"max_steps": NUM_STEPS, "target_ess": 0.999, "refine": False},
}
# Between two checkpoints within a round: some are a few steps old at the kill.
SAVE_SECONDS = 0.05


def schools(y: torch.Tensor, sigma: torch.Tensor) -> None:
    """Eight schools, non-centred."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros_like(y[0]), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5 * torch.ones_like(y[0])))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(torch.zeros_like(y[0]), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def train(kind: str, folder: Path, resume: bool, kill_at: int | None) -> None:
    """One run, in a process of its own; it ends by SIGKILL before the step `kill_at` counted from its beginning."""
    importlib.import_module("pyro_flows_ext.infer.training.run").SAVE_SECONDS = SAVE_SECONDS
    step, count = Trainer.step, 0

    def counted(self: Trainer, rate: float = 1.0) -> float | None:
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return step(self, rate)

    Trainer.step = counted  # type: ignore[method-assign]
    guide = AutoIAF(schools)
    result = fit(
        schools,
        guide,
        Y,
        SIGMA,
        checkpoint=folder / "fit.ckpt",
        resume=resume,
        seed=1,
        progress=False,
        **KINDS[kind],
    )
    torch.save(result.losses, folder / "losses.pt")


def in_process(kind: str, folder: Path, resume: bool, kill_at: int | None) -> int | None:
    """The exit code of `train` in a fork."""
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(kind, folder, resume, kill_at)
    )
    process.start()
    process.join()
    return process.exitcode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, same = random.Random(options.seed), 0
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            in_process(kind, Path(name), False, None)
            whole = torch.load(Path(name) / "losses.pt")
        for i in range(options.times):
            with tempfile.TemporaryDirectory() as name:
                first = draw.randrange(1, len(whole))
                second = draw.randrange(len(whole) - first + 1)
                codes = [
                    in_process(kind, Path(name), k > 0, at)
                    for k, at in enumerate((first, second, None))
                ]
                losses = torch.load(Path(name) / "losses.pt")
            equal = losses.shape == whole.shape and bool(
                losses.eq(whole).logical_or(losses.isnan() & whole.isnan()).all()
            )
            same += equal
            text = "identical" if equal else "DIFFERENT"
            print(
                f"{kind:10s} {i:3d}  killed at {first:3d} and {second:3d} more  {codes}  {text}",
                flush=True,
            )
    total = options.times * len(KINDS)
    print(f"{same} of {total} resumed runs end at the identical losses")
    raise SystemExit(same < total)


if __name__ == "__main__":
    main()
