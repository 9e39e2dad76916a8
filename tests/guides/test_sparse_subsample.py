"""Mini-batches of many data by `subsample_size`: different indices, each as likely, without a permutation of all data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.guides._local import MANY_DATA, SPARSE, distinct


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
