"""NumPyro's NUTS for `time_to_posterior.py`: a worker in an environment of its own.

One JSON object a line on standard input, one a line on standard output:

    {"model", "data": npz, "x64", "seed", "warmup", "draws", "chains", "output": npz, "timeout"}
        -> {"cpu", "wall", "divergences", "ess": least effective draws over scalars, by site, "r_hat": largest, by site}

Each request has a process of its own. The draws of every site go to `output`, chains one after the other. Seconds begin before the sampler is made, so that they
include tracing and XLA's compilation; imports and reading the data are left out.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import warnings
from typing import Any

import jax
import numpy as np
import numpyro
import plain_numpyro
import posteriors_numpyro
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS


def run(request: dict[str, Any]) -> dict[str, Any]:
    model = {**posteriors_numpyro.models(), **plain_numpyro.MODELS}[request["model"]]
    args = list(np.load(request["data"]).values())
    wall, cpu = time.perf_counter(), time.process_time()
    mcmc = MCMC(
        NUTS(model),
        num_warmup=request["warmup"],
        num_samples=request["draws"],
        num_chains=request["chains"],
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(request["seed"]), *args, extra_fields=("diverging", "num_steps"))
    draws = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    chains = {name: np.asarray(value, dtype=np.float64) for name, value in draws.items()}
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in chains.items()}
    np.savez(request["output"], **flat)
    extra = mcmc.get_extra_fields()
    return {
        "cpu": cpu,
        "wall": wall,
        "divergences": int(extra["diverging"].sum()),
        "leapfrogs": float(extra["num_steps"].mean()),
        "ess": {name: float(np.min(effective_sample_size(v))) for name, v in chains.items()},
        "r_hat": {name: float(np.max(split_gelman_rubin(v))) for name, v in chains.items()},
    }


def answer(request: dict[str, Any]) -> None:
    """Runs in a child: nothing traced or compiled for one request is there for the next."""
    resource.setrlimit(resource.RLIMIT_CPU, (request["timeout"], resource.RLIM_INFINITY))
    numpyro.enable_x64(request["x64"])
    try:
        reply = run(request) | {"jax": jax.__version__, "numpyro": numpyro.__version__}
    except Exception as error:  # one row's; the next may do better
        reply = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(reply), flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            answer(request)
            os._exit(0)
        if (status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) != 0:
            late = status == -signal.SIGXCPU
            reason = f"no answer in {request['timeout']} CPU s" if late else f"exit status {status}"
            print(json.dumps({"failed": reason}), flush=True)


if __name__ == "__main__":
    main()
