"""Latent angles and directions as vectors: evidence and moments by quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import tensor

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoIAF, CircularReparam
from pyro_flows_ext.guides.reparam import DirectionalVector
from pyro_flows_ext.infer import fit


def circular(model, *names):
    return poutine.reparam(model, config={name: CircularReparam() for name in names})


def test_an_angle_by_quadrature():
    def model():
        a = pyro.sample("a", dist.VonMises(0.0, 1.0))
        pyro.sample("y", dist.VonMises(a, 0.5), obs=tensor(1.0))

    grid = torch.linspace(-math.pi, math.pi, 4001)[:-1]
    log_joint = dist.VonMises(0.0, 1.0).log_prob(grid) + dist.VonMises(grid, 0.5).log_prob(
        tensor(1.0)
    )
    evidence = log_joint.logsumexp(0) + math.log(2 * math.pi / 4000)
    model = circular(model, "a")
    guide = AutoIAF(model)
    fit(model, guide, num_steps=200, num_particles=16, seed=0, progress=False)
    assert float(importance(guide, model, num_samples=4000).log_evidence) == pytest.approx(
        float(evidence), abs=0.03
    )
    x = guide.sample_posterior(4000)["a_vector"]
    angle = torch.atan2(x[:, 1], x[:, 0])
    mean = (log_joint.softmax(0) * grid.cos()).sum()
    torch.testing.assert_close(angle.cos().mean(), mean, atol=0.1, rtol=0)


PRIORS = {
    "angles in a plate": lambda: dist.VonMises(tensor([0.0, 3.0]), tensor([1.0, 4.0])),
    "two angles": lambda: dist.SineBivariateVonMises(0.0, 1.0, 2.0, 2.0, 0.5),
    "skewed": lambda: dist.SineSkewed(
        dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1), torch.ones(2) / 3
    ),
    "on a sphere": lambda: dist.VonMises3D(tensor([0.5, 1.0, -1.0])),
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_vector_has_a_density_of_mass_one(name):
    model = circular(lambda: pyro.sample("a", PRIORS[name]()), "a")
    fn = DirectionalVector(PRIORS[name]())
    x = 1.5 * torch.randn(20_000, *fn.shape())
    proposal = dist.Normal(torch.zeros(fn.shape()), 1.5).to_event(x.dim() - 1)
    log_p = fn.log_prob(x).reshape(len(x), -1).sum(-1)
    ratio = (log_p - proposal.log_prob(x)).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < 0.05
    torch.testing.assert_close(ratio.mean(), tensor(1.0), atol=4 * error, rtol=0)
    guide = AutoIAF(model)
    guide.setup()
    values = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace()))
    assert values.get_trace().log_prob_sum().isfinite()


def test_draws_of_the_prior_have_its_directions():
    torch.manual_seed(0)
    fn = DirectionalVector(dist.VonMises(1.0, 2.0))
    x = fn.sample((20_000,))
    torch.testing.assert_close(
        torch.atan2(x[:, 1], x[:, 0]).sub(1).cos().mean(), tensor(0.6978), atol=0.02, rtol=0
    )
    torch.testing.assert_close(x.square().sum(-1).mean(), tensor(2.0), atol=0.1, rtol=0)


def test_an_observed_angle_is_refused():
    model = circular(lambda: pyro.sample("a", dist.VonMises(0.0, 1.0), obs=tensor(0.3)), "a")
    with pytest.raises(ValueError, match="site 'a': expected a latent"):
        model()
