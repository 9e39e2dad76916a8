"""`ContinuouslyIndexedFlow` in Pyro programs: its model and guide, other ELBOs, training, and where it is refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import normal
from indexed_flows import one_layer, points
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import ContinuouslyIndexedFlow, FlowDistribution
from pyro_flows_ext.infer import ImportanceWeightedELBO


def programs(density, x, size=None):
    def model():
        pyro.module("density", density)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            density.model("x", x[index])

    def guide():
        pyro.module("density", density)
        with pyro.plate("data", len(x), subsample_size=size) as index:
            density.guide("x", x[index])

    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 20], ids=["all", "subsample"])
def test_weights_by_datum(size):
    """Σ_n log 1/K Σ_k w_nk, scaled by 40 / size: the mean of many bounds is that of log_prob_bound."""
    density, x, K = one_layer(), points(2).expand(40, 2), 5
    model, guide = programs(density, x, size)
    elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
    draws = torch.tensor([-elbo.loss(model, guide) for _ in range(200)])
    with torch.no_grad():
        expected = density.log_prob_bound(x.expand(1000, 40, 2), K).sum(-1)
    error = math.hypot(draws.std() / 200**0.5, expected.std() / 1000**0.5)
    assert abs(draws.mean() - expected.mean()) < 5 * error
    # One weight for all data, which is what a mean inside the wrong logarithm gives, is far below.
    with torch.no_grad():
        joint = density.log_prob(x.expand(1000, K, 40, 2)).sum(-1).logsumexp(1) - math.log(K)
    assert joint.mean() < draws.mean() - 5 * error


@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
def test_gradients_of_the_weighted_bound(gradient):
    """The mean over draws of the gradient of every parameter is the one of log_prob_bound."""
    density, x, K = one_layer(scale=0.3), points(3, 2), 3
    model, guide = programs(density, x)
    elbo = ImportanceWeightedELBO(K, gradient, max_plate_nesting=1, num_bounds=3000)
    parameters = list(density.parameters())
    ours = torch.autograd.grad(elbo.differentiable_loss(model, guide), parameters)
    value = -density.log_prob_bound(x.expand(30_000, 3, 2), K).mean(0).sum()
    theirs = torch.autograd.grad(value, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO], ids=lambda e: e.__name__)
def test_elbos_of_pyro_are_the_one_sample_bound(elbo):
    density, x = one_layer(), points(3, 2)
    model, guide = programs(density, x)
    estimate = -elbo(20_000, vectorize_particles=True, max_plate_nesting=1).loss(model, guide)
    with torch.no_grad():
        draws = density.log_prob(x.expand(20_000, 3, 2)).sum(-1)
    assert estimate == pytest.approx(draws.mean().item(), abs=10 * draws.std().item() / 20_000**0.5)


def test_model_without_data_draws():
    density = one_layer()
    with pyro.plate("rows", 4):
        trace = poutine.trace(lambda: density.model("x")).get_trace()
    assert trace.nodes["x"]["value"].shape == (4, 2)
    assert set(trace.nodes) == {"_INPUT", "x", "_RETURN"}


@pytest.mark.slow
def test_training_finds_two_parts_and_the_hole_between():
    """On [-2, -1] and [1, 2] alike, affine maps alone give a normal: here their indices make the parts."""

    def draw(n):
        return (torch.randint(2, (n, 1)) * 2.0 - 1) * (1 + torch.rand(n, 1))

    parts = [T.ElementwiseAffine(1) for _ in range(4)]
    density = ContinuouslyIndexedFlow(normal(1), parts, 1, (10,), (20,))

    def model(x):
        pyro.module("density", density)
        with pyro.plate("data", len(x)):
            pyro.sample("x", density, obs=x)

    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.993})
    svi = SVI(model, lambda x: None, optimizer, Trace_ELBO())
    for _ in range(300):
        svi.step(draw(100))
    x = draw(4000)
    with torch.no_grad():
        bound = density.log_prob_bound(x, 100).mean().item()
        inside = (density.sample((4000,)).abs() < 0.5).double().mean()
    normal_score = -0.5 * (math.log(2 * math.pi * 7 / 3) + 1)
    assert normal_score + 0.3 < bound < -math.log(2) + 0.05
    assert inside < 0.1


def test_importance_weights_refuse_it_in_a_guide():
    density = one_layer()
    prior = normal(2).expand(())

    def model():
        pyro.sample("z", prior)

    def guide():
        pyro.module("density", density)
        pyro.sample("z", density)

    with pytest.raises(ValueError, match="site 'z' of the guide"):
        ImportanceWeightedELBO(2, max_plate_nesting=0).loss(model, guide)


def test_is_a_prior_that_learns():
    """In the model log_prob is a bound on log p(z), and the ELBO still one on log p(x)."""
    density = one_layer().float()
    posterior = FlowDistribution(normal(2), T.planar(2))

    def model():
        pyro.module("density", density)
        z = pyro.sample("z", density)
        pyro.sample("x", dist.Normal(z[..., 0], 0.5), obs=torch.tensor(1.0))

    def guide():
        pyro.module("posterior", posterior)
        pyro.sample("z", posterior)

    loss = ImportanceWeightedELBO(4, max_plate_nesting=0).loss_and_grads(model, guide)
    assert math.isfinite(loss)
    assert all(p.grad.any() for p in [*density.parameters(), *posterior.parameters()])
