"""Models of one latent, where networks between latents have nothing to see."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_flows_ext.guides import AutoFlow, AutoIAF, AutoMAF, AutoNSF
from pyro_flows_ext.infer import fit

DATUM, NOISE = torch.tensor(2.25), 0.5**0.5
MEAN, SD = 1.5, 3**-0.5

GUIDES = {
    "nsf": AutoNSF,
    "nsf, autoregressive": lambda model: AutoNSF(model, kind="autoregressive"),
    "iaf": AutoIAF,
    "iaf, wide": lambda model: AutoIAF(model, hidden_dims=[256, 256]),
    "maf": AutoMAF,
    "by name": lambda model: AutoFlow(model, "nsf"),
}


def conjugate():
    """z ~ N(0, 1) and one datum: the posterior is N(MEAN, SD²)."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, NOISE), obs=DATUM)


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_step_moves_the_map_about_as_far_as_the_rate_says(make):
    """In whitened coordinates, by no more than a few times the rate a layer: the rate reaches each of its numbers once."""
    pyro.set_rng_seed(0)
    guide, lr = make(conjugate), 1e-3
    guide.setup()
    noise = torch.linspace(-2.0, 2.0, 41).unsqueeze(-1)
    flow = list(guide.get_transform())[:-1]  # the last one is the whitening

    def at(x):
        log_slope = torch.zeros(len(x))
        for part in flow:
            x, ladj = part.forward_and_ladj(x)
            log_slope = log_slope + ladj
        return x.detach().squeeze(-1), log_slope.detach()

    before = at(noise)
    SVI(conjugate, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO(num_particles=8)).step()
    num_layers = len(list(flow[0])) + len(flow) - 1
    for old, new in zip(before, at(noise), strict=True):
        assert 0 < (new - old).abs().max() <= 4 * lr * num_layers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nsf", "iaf"])
def test_cold_starts_end_at_the_posterior(name):
    guide = GUIDES[name](conjugate)
    fit(conjugate, guide, num_steps=200, progress=False, warm_start=False, seed=0)
    pyro.set_rng_seed(1)
    z = guide.sample_posterior(20_000)["z"]
    assert z.mean().item() == pytest.approx(MEAN, abs=0.15 * SD)
    assert z.std().item() == pytest.approx(SD, rel=0.15)


def test_two_latents_keep_their_networks():
    def pair():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoIAF(pair, hidden_dims=[9])
    guide.setup()
    assert [len(p) for p in guide.parameters() if p.dim() == 2] == [9, 4, 9, 4]
