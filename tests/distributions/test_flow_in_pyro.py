"""`FlowDistribution` in Pyro programs: what wraps it, prediction, training."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import Counted, LearnedNormal, normal
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import FlowDistribution
from pyro_flows_ext.testing import perturb


def flow(transform):
    return perturb(FlowDistribution(normal(2), transform)).double()


def test_mask_and_to_event():
    density = flow(T.sylvester(2))
    x = torch.randn(3, 2).double()
    rows = density.log_prob(x)
    kept = torch.tensor([True, False, True])
    masked = density.expand((3,)).mask(kept)
    torch.testing.assert_close(masked.log_prob(x), torch.where(kept, rows, 0.0))
    joint = density.expand((3,)).to_event(1)
    assert (joint.batch_shape, joint.event_shape) == ((), (3, 2))
    torch.testing.assert_close(joint.log_prob(x), rows.sum())
    assert joint.sample().shape == (3, 2)


@pytest.mark.parametrize("parallel", [False, True], ids=["loop", "parallel"])
def test_predictive(parallel):
    density = flow(T.sylvester(2))

    def model():
        pyro.module("density", density)
        with pyro.plate("rows", 3):
            pyro.sample("x", density)

    draws = Predictive(model, num_samples=5, parallel=parallel)()["x"]
    assert draws.reshape(-1, 2).unique(dim=0).shape == (15, 2)


def test_a_latent_with_a_flow_prior_finds_its_posterior():
    """x = z1 + N(0, .5²) with z = a + L N(0, I): the posterior of z in closed form."""
    prior = FlowDistribution(normal(2), T.ElementwiseAffine(2)).double()
    with torch.no_grad():
        prior.transform.loc.copy_(torch.tensor([1.0, -1.0]))
    prior.requires_grad_(False)
    guide_density = FlowDistribution(normal(2), T.ElementwiseAffine(2)).double()

    def model():
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=torch.tensor(2.0).double())

    def guide():
        pyro.module("q", guide_density)
        pyro.sample("z", guide_density)

    svi = SVI(
        model,
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0),
    )
    for _ in range(400):
        svi.step()
    draws = guide_density.sample((20_000,))
    assert draws.mean(0).tolist() == pytest.approx([1.8, -1.0], abs=0.1)
    assert draws.std(0).tolist() == pytest.approx([0.2**0.5, 1.0], rel=0.15)


def test_a_module_as_base_learns_by_maximum_likelihood():
    base = LearnedNormal(2)
    density = FlowDistribution(base, T.Whitening(torch.zeros(2), torch.eye(2)))
    data = torch.tensor([[3.0, -1.0], [5.0, -2.0], [4.0, 0.0]])

    def model():
        pyro.module("density", density)
        with pyro.plate("data", 3):
            pyro.sample("x", density, obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(400):
        svi.step()
    torch.testing.assert_close(base.loc, data.mean(0), rtol=0, atol=1e-2)
    torch.testing.assert_close(base.log_scale.exp(), data.std(0, correction=0), rtol=1e-2, atol=0)


def test_a_step_of_svi_with_a_flow_prior_and_flow_guide_is_one_pass_of_the_guide():
    transform = Counted(2)
    guide_density = FlowDistribution(normal(2), transform)

    def model():
        pyro.sample("z", normal(2))

    def guide():
        pyro.module("q", guide_density)
        pyro.sample("z", guide_density)

    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert transform.passes == ["forward"]
