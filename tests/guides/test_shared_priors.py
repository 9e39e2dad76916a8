"""Priors that are one object for several guides, or were scored before a guide was made."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import importance

PRIORS = {
    "lognormal": dist.LogNormal(0.0, 1.0),
    "gumbel": dist.Gumbel(0.0, 1.0),
    "lkj": dist.LKJCholesky(3, 2.0),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-1.0, 1.0]), 0.5)
    ),
    "transformed": dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]
    ),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_second_guide_on_a_prior_that_was_scored(name):
    prior = PRIORS[name]
    prior.log_prob(prior.sample())

    def model():
        pyro.sample("z", prior)

    for _ in range(2):
        pyro.clear_param_store()
        guide = AutoIAF(model, init_scale=1.0)
        guide()
        assert importance(model, guide, num_samples=20).log_weights.isfinite().all()


def test_two_guides_on_a_module_with_a_random_weight():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.LogNormal(0.0, 1.0))

        def forward(self, x, y):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.w * x, 1.0), obs=y)

    x = torch.tensor([1.0, 2.0])
    model = Regression()
    model(x, x)
    draws = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoIAF(model)
        guide(x, x)
        draws.append(guide.sample_posterior(5, x, x)["w"])
    assert (draws[0] > 0).all()
    assert torch.equal(*draws)
