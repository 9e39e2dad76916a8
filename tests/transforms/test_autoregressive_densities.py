"""Autoregressive flows as densities and guides, in both orientations, and conditional ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from autoregressive_layers import CONDITIONAL, KINDS, MAKE, normal, train
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.optim import ClippedAdam

from pyro_flows_ext.transforms import (
    affine_autoregressive,
)

# --- orientations ---


def passes(transform, run):
    """The names of the passes that `run` takes."""
    names = []
    for name in ("forward_and_ladj", "inverse_and_ladj"):
        method = getattr(transform, name)
        transform.__dict__[name] = lambda v, name=name, method=method: (
            names.append(name) or method(v)
        )
    run()
    for name in set(names) | {"forward_and_ladj", "inverse_and_ladj"}:
        del transform.__dict__[name]
    return names


def test_each_orientation_is_fast_in_its_own_direction():
    transform, y = affine_autoregressive(4), torch.randn(5, 4)
    iaf = dist.TransformedDistribution(normal(4), [transform])
    maf = dist.TransformedDistribution(normal(4), [transform.inv])
    assert passes(transform, lambda: iaf.log_prob(iaf.rsample((5,)))) == ["forward_and_ladj"]
    assert passes(transform, lambda: iaf.log_prob(y)) == ["inverse_and_ladj"]
    assert passes(transform, lambda: maf.log_prob(y)) == ["forward_and_ladj"]
    assert passes(transform, lambda: maf.log_prob(maf.rsample((5,)))) == ["inverse_and_ladj"]


@KINDS
@pytest.mark.parametrize("inverted", [False, True], ids=["scored-by-sweeps", "scored-in-one-pass"])
def test_either_orientation_learns_a_density(kind, inverted):
    """By maximum likelihood on a correlated normal density, whose entropy is the loss to reach."""
    scale_tril = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.5, 0.0], [-0.4, 0.3, 0.6]])
    density = dist.MultivariateNormal(torch.zeros(3), scale_tril=scale_tril)
    transform = MAKE[kind](3, (16,))
    transform = transform.inv if inverted else transform
    flow = dist.TransformedDistribution(normal(3), [transform])
    train(transform, lambda: -flow.log_prob(density.sample((256,))).mean(), 120, lr=5e-2)
    x = density.sample((4000,))
    with torch.no_grad():
        gap = (density.log_prob(x) - flow.log_prob(x)).mean().item()
    assert -0.02 < gap < 0.1


@pytest.mark.parametrize("inverted", [False, True], ids=["iaf", "maf"])
def test_guide_in_pyro(inverted):
    """The posterior of two coefficients given noisy sums, a normal distribution known in closed form."""
    sums, noise = torch.tensor([[1.0, 1.0], [1.0, -0.5]]), 0.5
    observed = torch.tensor([2.0, 0.3])

    def model():
        x = pyro.sample("x", normal(2))
        pyro.sample("y", dist.Normal(x @ sums.T, noise).to_event(1), obs=observed)

    def flow(dim):
        transform = affine_autoregressive(dim, (8,))
        return transform.inv if inverted else transform

    guide = AutoNormalizingFlow(model, flow)
    loss = Trace_ELBO(num_particles=32, max_plate_nesting=0, vectorize_particles=True)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / 200)}), loss)
    for _ in range(200):
        svi.step()
    precision = torch.eye(2) + sums.T @ sums / noise**2
    mean = torch.linalg.solve(precision, sums.T @ observed / noise**2)
    with torch.no_grad(), pyro.plate("draws", 4000):
        draws = guide()["x"]
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.12)
    torch.testing.assert_close(draws.T.cov(), precision.inverse(), rtol=0, atol=0.06)


# --- conditional forms ---


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_conditional_density_learns_the_context(kind):
    """y ~ N(c, 0.5²) twice, the second around the first."""
    transform = CONDITIONAL[kind](2, 1, (16,))
    flow = dist.ConditionalTransformedDistribution(normal(2), [transform.inv])

    def draw(n):
        context = torch.randn(n, 1)
        first = context + 0.5 * torch.randn(n, 1)
        return context, torch.cat([first, first + 0.5 * torch.randn(n, 1)], -1)

    def loss():
        context, y = draw(256)
        return -flow.condition(context).log_prob(y).mean()

    train(transform, loss, 200, lr=5e-2)
    context, y = draw(4000)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))
    with torch.no_grad():
        assert -flow.condition(context).log_prob(y).mean().item() == pytest.approx(
            entropy, abs=0.15
        )
        sample = flow.condition(torch.full((2000, 1), 1.0)).sample()
    assert sample.mean(0).tolist() == pytest.approx([1.0, 1.0], abs=0.2)
