"""`NeuTraReparam` with flow guides: the density in the flow's coordinates is the model's, latents in plates included."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import NeuTraReparam

from pyro_flows_ext.guides import (
    AutoIAF,
    AutoMAF,
    AutoNSF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSylvester,
)
from pyro_flows_ext.programs import LogJoint

Y = torch.tensor([0.3, 2.0, -1.0, 4.0])


def plated():
    with pyro.plate("p", 4):
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 3.0), obs=Y)


def two_plates():
    with pyro.plate("q", 2, dim=-2), pyro.plate("p", 4, dim=-1):
        x = pyro.sample("x", dist.Dirichlet(torch.ones(3)))
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("r", 4, dim=-1):
        b = pyro.sample("b", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(a + b + x[0, :, 0], 1.0), obs=Y)


def bounded_by_latent():
    with pyro.plate("p", 4):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("y", dist.Normal(b, 3.0), obs=Y)


GUIDES = [
    AutoIAF,
    AutoMAF,
    AutoNSF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSylvester,
]


def in_flow_coordinates(guide, model, z):
    """The log-density that HMC has of z, in Pyro, and that of the model by change of variables."""
    reparametrised = NeuTraReparam(guide.requires_grad_(False)).reparam(model)
    name = f"{guide.latents[0].name}_shared_latent"
    trace = poutine.trace(poutine.condition(reparametrised, {name: z})).get_trace()
    u, ladj = guide.transform.forward_and_ladj(z)
    return trace.log_prob_sum(), LogJoint(model)(u) + ladj


@pytest.mark.parametrize("guide_type", GUIDES)
@pytest.mark.parametrize("model", [plated, two_plates, bounded_by_latent])
def test_density_in_the_coordinates_of_the_flow(guide_type, model):
    guide = guide_type(model, init_scale=1.0)
    guide.setup()
    for _ in range(2):
        got, expected = in_flow_coordinates(guide, model, torch.randn(guide.latent_dim))
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_moments_by_quadrature():
    grid = torch.linspace(-6, 6, 4001)
    log_p = -0.5 * grid**2 - 0.5 * ((Y[:, None] - grid.exp()) / 3) ** 2
    expected = log_p.softmax(-1) @ grid
    guide = AutoSylvester(plated, 1, init_scale=1.0)
    guide.setup()
    guide.requires_grad_(False)
    model = NeuTraReparam(guide).reparam(plated)
    mcmc = MCMC(
        NUTS(model, max_tree_depth=3), num_samples=300, warmup_steps=60, disable_progbar=True
    )
    mcmc.run()
    log_x = guide.transform(mcmc.get_samples()["x_shared_latent"])
    torch.testing.assert_close(log_x.mean(0), expected, atol=0.3, rtol=0)


def test_the_transform_of_other_callers_has_its_own_log_det():
    guide = AutoIAF(plated)
    guide.setup()
    z = torch.randn(4)
    transform = guide.get_transform()
    assert transform.log_abs_det_jacobian(z, transform(z)).shape == ()


def scaled():
    with poutine.scale(scale=0.5):
        pyro.sample("x", dist.LogNormal(0.0, 1.0))


def masked():
    with poutine.mask(mask=torch.tensor([True, False])), pyro.plate("p", 2):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def moved():
    base = dist.HalfNormal(torch.tensor(1.0))
    move = dist.transforms.AffineTransform(3.0, 1.0)
    pyro.sample("x", dist.TransformedDistribution(base, move))


@pytest.mark.parametrize("model", [scaled, masked, moved])
def test_what_it_would_count_wrong_is_refused(model):
    guide = AutoIAF(model)
    guide.setup()
    with pytest.raises(ValueError, match="NeuTraReparam: latent 'x' has"):
        NeuTraReparam(guide).reparam(model)()
