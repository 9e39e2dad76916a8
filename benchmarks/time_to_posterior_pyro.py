"""`fit` and Pyro's own guides for `time_to_posterior.py`: seconds, verdict and the moments of 4000 draws."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from time_to_posterior_problems import Problem, moments

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import fit

STOCK = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
NUM_DRAWS, STOCK_STEPS, STOCK_RATE = 4000, 2000, 0.01


def cpu_seconds() -> float:
    """Of this process, all its threads, and its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def run_fit(task: Problem, seed: int) -> dict[str, Any]:
    """`fit` at its defaults."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = fit(task.model, AutoIAF(task.model), *task.args, seed=seed, progress=False)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    torch.manual_seed(seed)
    row: dict[str, Any] = {
        "cpu": cpu,
        "wall": wall,
        "trusted": result.trusted,
        "reason": result.reason,
        "verdict": result.verdict,
        "advice": list(result.advice),
        "steps": result.steps,
        "start": result.warm_start.name if result.warm_start else None,
        "moments": moments(task.quantities(result.sample(NUM_DRAWS))),
    }
    if result.importance is not None:
        row |= {"k_hat": result.importance.k_hat, "efficiency": result.importance.efficiency}
    if result.refined is not None:
        row["r_hat"] = result.refined.max_r_hat
    return row


def run_stock(task: Problem, kind: str, seed: int) -> dict[str, Any]:
    """One of Pyro's guides at its usual setting: Adam, one particle."""
    pyro.set_rng_seed(seed)
    torch.set_default_dtype(task.dtype)
    wall, cpu = time.perf_counter(), cpu_seconds()
    guide = STOCK[kind](task.model)
    svi = SVI(task.model, guide, pyro.optim.Adam({"lr": STOCK_RATE}), Trace_ELBO())
    for _ in range(STOCK_STEPS):
        svi.step(*task.args)
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    draw = Predictive(guide, num_samples=NUM_DRAWS, parallel=True)
    with torch.no_grad():
        samples = draw(*task.args)
    return {"cpu": cpu, "wall": wall, "moments": moments(task.quantities(samples))}


def _answer(sender: Connection, task: Problem, method: str, seed: int, timeout: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")
    try:
        row = run_fit(task, seed) if method == "fit" else run_stock(task, method, seed)
    except Exception as error:  # one row's; the next may do better
        row = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    sender.send(row)


def run_pyro(task: Problem, method: str, seed: int, timeout: int) -> dict[str, Any]:
    """A run in a fork of this process, which starts with no parameters and no caches; {"failed": ...} if it ends without.

    `timeout` is in CPU seconds.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, task, method, seed, timeout))
    process.start()
    sender.close()
    try:
        row = dict(receiver.recv())
    except EOFError:
        row = {}
    process.join()
    if not row:
        late = process.exitcode == -signal.SIGXCPU
        reason = f"no answer in {timeout} CPU s" if late else f"exit status {process.exitcode}"
        row = {"failed": reason}
    return row
