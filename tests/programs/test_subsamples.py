"""Mini-batches of many data by `subsample_size`: different indices, each as likely, without a permutation of all data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_flows_ext as pf
from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.infer.compiled.steps import CompiledTraining
from pyro_flows_ext.programs import LogJoint
from pyro_flows_ext.programs.subsamples import MANY_DATA, SPARSE, distinct


@pytest.mark.parametrize("size", [1, 2, 1000, MANY_DATA // SPARSE])
def test_indices_are_different_and_in_range(size):
    index = distinct(MANY_DATA, size)
    assert index.shape == (size,)
    assert len(index.unique()) == size
    assert index.min() >= 0
    assert index.max() < MANY_DATA


def test_every_index_is_as_likely_at_every_place():
    # Eight cells; the counts of 4000 draws of pairs are binomial, with a sd of 21.
    pairs = torch.stack([distinct(MANY_DATA, 2) for _ in range(4000)]) * 8 // MANY_DATA
    for place in pairs.unbind(1):
        assert (place.bincount(minlength=8) - 500).abs().max() < 5 * 21
    same = (pairs[:, 0] == pairs[:, 1]).sum()
    assert abs(same - 500) < 5 * 21


def test_a_step_permutes_no_data(monkeypatch):
    x = torch.randn(MANY_DATA, 1)

    def model(x, size):
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index, 0])

    guide = AutoAmortizedFlow(model, nn.Linear(1, 4), flow=None)
    guide(x, 10)

    def refused(*_, **__):
        raise AssertionError("a permutation of all data")

    monkeypatch.setattr(torch, "randperm", refused)
    trace = poutine.trace(guide).get_trace(x, 10)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x, 10)
    index = trace.nodes["data"]["value"]
    assert len(index.unique()) == 10
    assert torch.equal(index, replayed.nodes["data"]["value"])
    assert torch.equal(replayed.nodes["x"]["value"], x[index, 0])
    assert not torch.equal(index, poutine.trace(guide).get_trace(x, 10).nodes["data"]["value"])


def global_model(x, size):
    """One mean of all data; the data plate draws its rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


@pytest.mark.parametrize(
    "options",
    [
        {"guide": pf.AutoIAF},
        {"guide": AutoNormal},
        {"guide": AutoNormal, "num_particles": 1},
        {"guide": pf.AutoIAF, "loss": pf.ImportanceWeightedELBO(1, "stl")},
    ],
    ids=["path gradient", "ELBO", "one particle", "importance-weighted"],
)
def test_fit_of_global_latents_permutes_no_data(options, monkeypatch):
    permutations, taken = [], []
    randperm = torch.randperm

    def counted(*args, **kwargs):
        permutations.append(args)
        return randperm(*args, **kwargs)

    def model(x, size):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=size) as index:
            taken.append(index)
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])

    monkeypatch.setattr(torch, "randperm", counted)
    counts = []
    for num_steps in (2, 12):
        pyro.clear_param_store()
        permutations.clear()
        guide = options["guide"](model)
        rest = {name: value for name, value in options.items() if name != "guide"}
        pf.fit(
            model,
            guide,
            torch.randn(MANY_DATA),
            100,
            num_steps=num_steps,
            warm_start=False,
            compile=False,
            progress=False,
            seed=0,
            **rest,
        )
        counts.append(len(permutations))
    assert counts[0] == counts[1]
    assert all(len(index.unique()) == 100 for index in taken)
    assert not torch.equal(taken[-1], taken[-2])


def test_a_compiled_step_of_fit_permutes_no_data():
    x = torch.randn(MANY_DATA)
    guide = AutoNormal(global_model)
    guide(x, 100)
    params = {name: p.unconstrained() for name, p in pyro.get_param_store().items()}
    optim = torch.optim.Adam(params.values())
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optim.step()
    loss = Trace_ELBO()
    training = CompiledTraining(
        loss, global_model, guide, (x, 100), {}, params=params, optim=optim, backend="eager"
    )
    graph = training._signature.traced.graph
    names = [str(node.target) for node in graph.graph.nodes]
    assert any("randint" in name for name in names)
    assert not any("randperm" in name for name in names)
    assert training.step() is not None


def test_particles_of_a_log_joint_share_a_subsample():
    x = torch.randn(MANY_DATA)
    log_joint = LogJoint(global_model, (x, 100), {})
    first, second = log_joint(torch.zeros(2, 1))
    assert first == second
    assert log_joint(torch.zeros(1, 1)) != first
