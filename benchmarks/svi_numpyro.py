"""The columns of `svi.py` that are NumPyro's: a worker that lives in an environment of its own.

`svi.py --numpyro` makes that environment, writes the data of a model to an .npz and starts this script. It reads one JSON
object a line and answers with one:

    {"model": ..., "guide": ..., "particles": ..., "steps_per_call": ..., "data": PATH}  ->  {"columns": [...], "seconds": ...}
    {"column": "numpyro", "count": 50}                                                  ->  {"ms": ..., "loss": ...}

What fails is answered with {"failed": ...}; a guide that NumPyro does not have, with no columns. Models, guides and
settings are those of `svi.py`: float32, Adam with rate 1e-3, `Trace_ELBO`, whose particles NumPyro maps over.

    numpyro     the jitted `SVI.update`, called once a step; the loss is made a float, as Pyro's `step` returns one
    unfetched   the same, but nobody reads the losses: a call returns before it is done, and the next is prepared meanwhile
    scan        `lax.scan` over `steps_per_call` updates, jitted; the losses are fetched once a call
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax
from numpyro.handlers import seed, trace
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal

Model = Callable[..., None]


def schools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("J", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def logistic(X: Any, y: Any) -> None:
    w = numpyro.sample("w", dist.Normal(jnp.zeros(X.shape[1]), 1.0).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=X @ w), obs=y)


def radon(county: Any, floor: Any, y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("counties", 85):
        offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
    mean = mu + tau * offset[county] + slope * floor
    with numpyro.plate("houses", len(y)):
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def vae() -> tuple[Model, Model]:
    encoder = stax.serial(stax.Dense(256), stax.Relu, stax.Dense(20))
    decoder = stax.serial(stax.Dense(256), stax.Relu, stax.Dense(64))

    def model(x: Any) -> None:
        decode = numpyro.module("decoder", decoder, (len(x), 10))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(x), 10)), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(jax.nn.sigmoid(decode(z)), 0.1).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encode = numpyro.module("encoder", encoder, x.shape)
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(encode(x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide


MODELS: dict[str, Model] = {"schools": schools, "logistic": logistic, "radon": radon}


def num_latents(model: Model, args: list[Any]) -> int:
    sites = trace(seed(model, 0)).get_trace(*args).values()
    return sum(s["value"].size for s in sites if s["type"] == "sample" and not s["is_observed"])


def make(name: str, guide: str, args: list[Any]) -> tuple[Model, Any] | None:
    """A model and its guide; None for guides that NumPyro does not have."""
    if name == "vae":
        return vae()
    model = MODELS[name]
    if (
        guide == "pyro-iaf"
    ):  # the layers of Pyro's; NumPyro reverses the order in between, by default
        hidden = [3 * num_latents(model, args) + 1]
        return model, AutoIAFNormal(model, num_flows=2, hidden_dims=hidden, nonlinearity=stax.Relu)
    makers = {"normal": AutoNormal, "mvn": AutoMultivariateNormal}
    return (model, makers[guide](model)) if guide in makers else None


class Columns:
    """The three ways to take steps, each with a state of its own."""

    def __init__(self, request: dict[str, Any]) -> None:
        args = [jnp.asarray(array) for array in np.load(request["data"]).values()]
        made = make(request["model"], request["guide"], args)
        self.take: dict[str, Callable[[Any, int], tuple[Any, Any]]] = {}
        if made is None:
            return
        self.size, self.args = request["steps_per_call"], args
        elbo = Trace_ELBO(num_particles=request["particles"])
        self.svi = SVI(*made, numpyro.optim.Adam(1e-3), elbo)
        state = self.svi.init(jax.random.PRNGKey(0), *args)
        self.update = jax.jit(self.svi.update)
        self.scan = jax.jit(self._scan)
        self.take = {
            "numpyro": partial(self._loop, fetch=True),
            "unfetched": partial(self._loop, fetch=False),
        }
        if self.size > 1:
            self.take["scan"] = self._scans
        self.states = dict.fromkeys(self.take, state)

    def time(self, column: str, count: int) -> dict[str, float]:
        """Milliseconds a step, and the mean loss of these steps or of their last call."""
        start = time.perf_counter()
        self.states[column], losses = self.take[column](self.states[column], count)
        ms = (time.perf_counter() - start) / count * 1e3
        return {"ms": ms, "loss": float(np.mean(losses))}

    def _loop(self, state: Any, count: int, fetch: bool) -> tuple[Any, Any]:
        losses = []
        for _ in range(count):
            state, loss = self.update(state, *self.args)
            losses.append(float(loss) if fetch else loss)
        if not fetch:
            jax.block_until_ready((state, losses))
        return state, losses

    def _scan(self, state: Any, *args: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda s, _: self.svi.update(s, *args), state, None, length=self.size)

    def _scans(self, state: Any, count: int) -> tuple[Any, Any]:
        losses = np.zeros(1)
        for _ in range(count // self.size):
            state, device_losses = self.scan(state, *self.args)
            losses = np.asarray(device_losses)
        jax.block_until_ready(state)
        return state, losses


def answer(request: dict[str, Any], columns: Columns | None) -> tuple[Columns | None, Any]:
    if "column" in request:
        if columns is None:
            raise RuntimeError("no model was asked for")
        return columns, columns.time(request["column"], request["count"])
    start = time.perf_counter()
    columns = Columns(request)
    return columns, {"columns": list(columns.take), "seconds": time.perf_counter() - start}


def main() -> None:
    versions = {m.__name__: m.__version__ for m in (jax, jaxlib, numpyro, np)}
    print(json.dumps(versions), flush=True)
    columns: Columns | None = None
    for line in sys.stdin:
        try:
            columns, reply = answer(json.loads(line), columns)
        except Exception as error:  # one row's; the next may do better
            reply = {"failed": f"{type(error).__name__}: {str(error)[:80]}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
