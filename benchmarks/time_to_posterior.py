"""How long until a posterior can be trusted: `fit` beside NumPyro's NUTS and Pyro's own guides.

    export PYRO_FLOWS_DATA=path/to/data
    python benchmarks/time_to_posterior.py --references references.json --output benchmark-output
    python benchmarks/time_to_posterior.py --references references.json --models arK mixture --methods fit nuts --seeds 1
    python benchmarks/time_to_posterior_report.py benchmark-output/time_to_posterior.json --references references.json

Sixteen posteriors with reference moments (`targets`, float64) and eight models written the plain way (`plain_models.py`,
float32). A result is right with means within .15 reference sds and sds within 15 %; sds that the reference's own draws
do not determine to 5 % are not compared. Methods:

    fit     `fit(model, AutoIAF(model), ...)` at its defaults, until its verdict; errors of `result.sample(4000)`
    nuts    NumPyro's NUTS, one chain, 1000 draws after 1000 of warm-up, tracing and compilation included
    AutoNormal, AutoMultivariateNormal      2000 steps of Pyro's SVI, Adam at rate .01, one particle

Every run is a process of its own with one thread; seconds leave out imports and reading the data. CPU seconds are those of
the process and its children, so that a busy machine changes them little. The moments of plain models come from 4 chains of
2500 draws, run where `--references` does not have them yet, in float64. NumPyro's environment is made where
`--numpyro-env` says. Rows go to time_to_posterior.json after every run; a run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpyro_environment import DEFAULT, interpreter, variables
from targets.target import read_npz
from time_to_posterior_problems import NAMES, Problem, errors, is_right, moments, problem
from time_to_posterior_pyro import run_pyro

HERE = Path(__file__).resolve().parent
METHODS = ("fit", "nuts", "AutoNormal", "AutoMultivariateNormal")
# A reference mean is then known to .03 sd, and its sd to 2 %.
SETTLED_ESS, SETTLED_R_HAT = 1000, 1.01
Row = dict[str, Any]


class NumPyro:
    """The worker of `time_to_posterior_numpyro.py`, in NumPyro's environment."""

    def __init__(self, env: Path) -> None:
        self.env = env
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: Row) -> Row:
        """The reply to one request; the worker starts with the first."""
        if self.process is None:
            pipe = subprocess.PIPE
            command = [interpreter(self.env), HERE / "time_to_posterior_numpyro.py"]
            self.process = subprocess.Popen(
                command, env=variables(1), stdin=pipe, stdout=pipe, text=True
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError("NumPyro's process ended")
        return dict(json.loads(reply))


def run_nuts(task: Problem, seed: int, peer: NumPyro, timeout: int, **settings: Any) -> Row:
    """NumPyro's NUTS, the moments of its draws, and the least effective draws over the compared scalars."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "data.npz", Path(folder) / "draws.npz"
        np.savez(data, *(np.asarray(arg) for arg in task.numpyro_args))
        request = {
            "model": task.name,
            "data": str(data),
            "x64": task.dtype == torch.float64,
            "seed": seed,
            "warmup": 1000,
            "draws": 1000,
            "chains": 1,
            "output": str(output),
            "timeout": timeout,
        } | settings
        row = peer.ask(request)
        if "failed" in row:
            return row
        scalars = task.quantities(read_npz(output))
    row["moments"] = moments(scalars)
    sites = {name.split("[")[0] for name in scalars}
    row["ess"] = min(row["ess"][name] for name in sites)
    row["r_hat"] = max(row["r_hat"][name] for name in sites)
    return row


def reference_of(task: Problem, path: Path, peer: NumPyro) -> dict[str, Any]:
    """The moments to compare with: the target's own, or those of a long run, read from `path` or written there."""
    if task.reference is not None:
        return task.reference
    known = json.loads(path.read_text()) if path.exists() else {}
    if task.name not in known:
        print(f"{task.name}: 4 chains of 2500 draws", file=sys.stderr, flush=True)
        settings = {"warmup": 1000, "draws": 2500, "chains": 4, "x64": True}
        row = run_nuts(task, 1234, peer, timeout=24 * 3600, **settings)
        if "failed" in row:
            raise RuntimeError(f"{task.name}: no reference: {row['failed']}")
        known = json.loads(path.read_text()) if path.exists() else {}
        known[task.name] = row
        path.write_text(json.dumps(known, indent=1))
    ess, r_hat = known[task.name]["ess"], known[task.name]["r_hat"]
    if ess < SETTLED_ESS or r_hat > SETTLED_R_HAT:
        text = f"{task.name}: the reference is not settled (ESS {ess:.0f}, R-hat {r_hat:.3f})"
        print(f"{text}; errors against it decide nothing", file=sys.stderr, flush=True)
    return dict(known[task.name]["moments"])


def show(row: Row) -> str:
    """One line of a run."""
    head = f"{row['model'][:40]:40s} {row['method'][:12]:12s} {row['seed']}  "
    if "failed" in row:
        return head + row["failed"]
    text = head + f"{row['cpu']:7.1f} CPU s {row['wall']:7.1f} s"
    if "mean_error" in row:
        text += f"  mean {row['mean_error']:7.3f}  sd {row['sd_low']:.2f} to {row['sd_high']:.2f}"
        text += "  right" if row["right"] else "       "
    if "trusted" in row:
        text += f"  {'trusted' if row['trusted'] else 'not trusted: ' + row['reason']}"
    return text + (f"  ESS {row['ess']:.0f}" if "ess" in row else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[""], help="parts of names; all if none")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["fit", "nuts"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=600, help="CPU seconds of a run")
    parser.add_argument("--references", type=Path, help="JSON of the plain models' moments")
    parser.add_argument("--numpyro-env", type=Path, default=DEFAULT)
    parser.add_argument("--output", type=Path, help="folder for time_to_posterior.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peer = NumPyro(options.numpyro_env)
    path = options.output / "time_to_posterior.json" if options.output else None
    rows: list[Row] = json.loads(path.read_text()) if path and path.exists() else []
    done = {(row["model"], row["method"], row["seed"]) for row in rows}
    for name in [n for n in NAMES if any(part in n for part in options.models)]:
        task = problem(name)
        reference = task.reference
        if options.references:
            reference = reference_of(task, options.references, peer)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for method in [m for m in options.methods if (name, m, seed) not in done]:
                if method == "nuts":
                    row = run_nuts(task, seed, peer, options.timeout)
                else:
                    row = run_pyro(task, method, seed, options.timeout)
                row = {"model": name, "dim": task.dim, "method": method, "seed": seed} | row
                if reference and "moments" in row:
                    row |= errors(row["moments"], reference, task.unsettled)
                    row["right"] = is_right(row)
                rows.append(row)
                print(show(row), flush=True)
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
