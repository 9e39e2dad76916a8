"""Plates that are given their rows: recognised by the rows and not by their number."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn, tensor

from pyro_flows_ext.guides import AutoAmortizedFlow, AutoIAF, AutoSylvester
from pyro_flows_ext.infer import fit

Y = torch.arange(12) / 4.0
ORDER = torch.arange(12)


def local(rows):
    with pyro.plate("d", 12, subsample=rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y[rows])


ROWS = {
    "permutation": torch.randperm(12, generator=torch.Generator().manual_seed(0)),
    "reversed": ORDER.flip(0),
    "bootstrap": tensor([0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    "part": ORDER[:5],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_at_the_setup(name):
    with pytest.raises(ValueError, match=r"latent 'z' is local to plate 'd'.*AutoAmortizedFlow"):
        AutoSylvester(local, 1).setup(ROWS[name])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("hidden", [False, True], ids=["", "expose"])
def test_rows_after_the_setup(name, hidden):
    guide = AutoSylvester(poutine.block(local, expose=["z"]) if hidden else local, 1)
    guide.setup(ORDER)
    assert guide(ORDER.clone())["z"].shape == (12,)
    with pytest.raises(ValueError, match=r"latent 'z' is local to plate 'd'.*AutoAmortizedFlow"):
        guide(ROWS[name])


def test_global_latents_beside_rows_by_argument():
    def model(rows):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("d", 12, subsample=rows):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[rows])

    guide = AutoIAF(model)
    guide.setup(ORDER)
    for rows in ROWS.values():
        assert guide(rows)["mu"].shape == ()


@pytest.mark.parametrize("name", ROWS)
def test_an_amortized_guide_takes_the_rows_that_it_is_given(name):
    guide = AutoAmortizedFlow(
        local, nn.Linear(1, 1), flow=None, encoder_inputs=lambda rows: Y.unsqueeze(-1)
    )
    guide.setup(ORDER)
    encoded = []
    guide.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    assert guide(ROWS[name])["z"].shape == ROWS[name].shape
    torch.testing.assert_close(encoded[-1], Y[ROWS[name]].unsqueeze(-1))


def test_an_amortized_guide_predicts_without_data():
    torch.manual_seed(0)
    t = torch.randn(10, 2)
    x = t.sum(-1) + torch.randn(10)

    def model(t, x=None):
        with pyro.plate("data", len(t)):
            z = pyro.sample("z", dist.Normal(t[:, 0], 1.0))
            pyro.sample("x", dist.Normal(z + t[:, 1], 0.1), obs=x)

    guide = AutoAmortizedFlow(model, nn.Linear(2, 4), encoder_inputs=lambda t, x=None: t)
    fit(model, guide, t, x, num_steps=5, seed=0, progress=False, num_particles=2)
    for rows in (t, t[:4]):
        draws = Predictive(model, guide=guide, num_samples=50)(rows)
        assert draws["z"].shape == draws["x"].shape == (50, len(rows))
        expected = draws["z"] + rows[:, 1]
        torch.testing.assert_close(draws["x"].mean(0), expected.mean(0), atol=0.1, rtol=0)
