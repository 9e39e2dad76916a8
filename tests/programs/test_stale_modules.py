"""Modules whose parameters are not those that the store trains are refused by `fit`."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.infer import fit

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def autoencoder(decoder, **options):
    def model(x):
        pyro.module("decoder", decoder, **options)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    return model


def train(model):
    guide = AutoAmortizedFlow(model, nn.Linear(3, 8), flow=None)
    return fit(model, guide, X, num_steps=2, seed=0, progress=False)


def forget_guides():
    store = pyro.get_param_store()
    for name in list(store.keys()):
        if not name.startswith("decoder"):
            del store[name]


def test_a_second_module_of_one_name_is_refused() -> None:
    pyro.clear_param_store()
    decoder = nn.Linear(2, 3)
    before = decoder.weight.detach().clone()
    train(autoencoder(decoder))
    assert not torch.equal(decoder.weight, before)
    forget_guides()
    with pytest.raises(
        ValueError, match=r"pyro.module: expected the parameter 'decoder\$\$\$weight'"
    ):
        train(autoencoder(nn.Linear(2, 3)))


def test_the_same_module_and_one_that_takes_over_the_store_go_on() -> None:
    pyro.clear_param_store()
    decoder, other = nn.Linear(2, 3), nn.Linear(2, 3)
    train(autoencoder(decoder))
    forget_guides()
    train(autoencoder(decoder))
    forget_guides()
    before = decoder.weight.detach().clone()
    train(autoencoder(other, update_module_params=True))
    assert other.weight.data_ptr() == decoder.weight.data_ptr()
    assert not torch.equal(other.weight, before)


def test_a_parameter_that_the_store_copies_is_refused() -> None:
    pyro.clear_param_store()
    decoder = nn.Linear(2, 3)
    decoder.weight = nn.Parameter(torch.randn(2, 3).t())
    with pytest.raises(ValueError, match="not contiguous"):
        train(autoencoder(decoder))
