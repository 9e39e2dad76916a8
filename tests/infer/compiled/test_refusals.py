"""Models that do not compile: each says why, once, with the line, and trains eagerly as under `pyro.infer.SVI`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from test_zoo import Case, Y, agree, guided, schools, train


def reads_item() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.item(), 1.0), obs=Y[0])  # item


def reads_parameter() -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, float(scale.detach())), obs=Y[0])  # float


def leaves_by_numpy() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(float(np.tanh(z.detach().numpy())), 1.0), obs=Y[0])  # numpy


def leaves_by_list() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.detach().tolist(), 1.0), obs=Y[0])  # tolist


def branches() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 0:  # branch
        z = 2 * z
    pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0])


def selects() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[z > 0].sum(), 1.0), obs=Y[0])  # boolean index


def counting() -> tuple[Any, Any]:
    """Annealing by a number of Python's: what it is when the graph is made stays in it."""
    calls = []

    def model() -> None:
        calls.append(1)
        with poutine.scale(scale=min(1.0, len(calls) / 1000)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0])

    return model, AutoNormal(model)


def numpy_noise() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0] + float(np.random.randn()))  # noqa: NPY002


def python_noise() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0] + random.gauss(0, 1))


def enumerated() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(z + k, 1.0), obs=Y[0])


def hides_enumerated(model: Any) -> Any:
    return AutoNormal(poutine.block(model, hide=["k"]))


NOT_THE_PROGRAM = "does not reproduce the program"
REFUSED = {
    "item": (Case(guided(reads_item, AutoNormal)), r"reads? .*refusals.py, line \d+: .*# item"),
    "float": (Case(guided(reads_parameter, AutoNormal)), r"refusals.py, line \d+: .*# float"),
    "numpy": (
        Case(guided(leaves_by_numpy, AutoNormal)),
        r"numpy.*refusals.py, line \d+: .*# numpy",
    ),
    "tolist": (Case(guided(leaves_by_list, AutoNormal)), r"refusals.py, line \d+: .*# tolist"),
    "branch": (Case(guided(branches, AutoNormal)), r"refusals.py, line \d+: .*# branch"),
    "boolean-index": (
        Case(guided(selects, AutoNormal)),
        r"refusals.py, line \d+: .*# boolean index",
    ),
    "numpy-noise": (Case(guided(numpy_noise, AutoNormal)), NOT_THE_PROGRAM),
    "python-noise": (Case(guided(python_noise, AutoNormal)), NOT_THE_PROGRAM),
    "TraceEnum": (
        Case(guided(enumerated, hides_enumerated), loss=TraceEnum_ELBO),
        "TraceEnum_ELBO is not",
    ),
    "TraceGraph": (
        Case(guided(schools, AutoNormal), loss=TraceGraph_ELBO),
        "TraceGraph_ELBO is not",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_reason_and_goes_on_eagerly(name: str) -> None:
    case, reason = REFUSED[name]
    with pytest.warns(UserWarning, match=reason) as caught:
        ours = train(case, compiled=True)
    assert len(caught) == 1
    agree(ours, train(case, compiled=False))


def test_notices_a_number_that_python_counts() -> None:
    """Its count goes on in the comparison, so that the numbers are not those of a run without."""
    with pytest.warns(UserWarning, match=NOT_THE_PROGRAM):
        train(Case(counting), compiled=True)
