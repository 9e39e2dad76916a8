"""A model with latents of several supports, and guides for it."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.guides import (
    AutoPlanar,
    AutoRadial,
    AutoSylvester,
)
from pyro_flows_ext.infer import fit

GUIDES = {"planar": AutoPlanar, "radial": AutoRadial, "sylvester": AutoSylvester}
every_guide = pytest.mark.parametrize("guide_type", GUIDES.values(), ids=GUIDES)

Y = torch.tensor([1.2, -0.4, 0.3])


def model(y=Y):
    """A global latent on the line, a positive one, a simplex, and one in a plate."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


SHAPES = {"mu": (), "tau": (), "p": (3,), "theta": (3,)}
D = 7  # unconstrained: 1 + 1 + 2 + 3


def trained(guide_type, steps=20, **options):
    guide = guide_type(model, **options)
    fit(model, guide, Y, num_steps=steps, num_particles=4, progress=False, warm_start=False, seed=1)
    return guide
