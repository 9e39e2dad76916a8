"""Dequantisation: closed forms given the noise, bounds on probabilities that add up to one, samples, refusals."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.distributions.dequantize import Dequantized
from pyro_flows_ext.distributions.flow import FlowDistribution
from pyro_flows_ext.distributions.ordered import NestedDropoutFlow
from pyro_flows_ext.transforms import ElementwiseAffine, affine_coupling


def normal_density(dim=3, loc=0.0, scale=1.0):
    """N(loc, scale²) by an affine layer, in float64."""
    transform = ElementwiseAffine(dim)
    torch.nn.init.constant_(transform.loc, loc)
    torch.nn.init.constant_(transform.log_scale, math.log(scale))
    return FlowDistribution(dist.Normal(torch.zeros(dim), 1.0), transform).double()


def test_bits_per_dim_given_the_noise():
    """Of an identity flow: the formula of the literature, written out."""
    density, alpha = normal_density(), 0.05
    x, u = torch.tensor([[0.0, 100.0, 255.0]]).double(), torch.rand(1, 3).double()
    s = alpha + (1 - 2 * alpha) * (x + u) / 256
    log_z = dist.Normal(0.0, 1.0).log_prob((s / (1 - s)).log())
    log_det = math.log(1 - 2 * alpha) - math.log(256) - s.log() - (1 - s).log()
    expected = -(log_z + log_det).sum(-1) / (3 * math.log(2))
    flow = Dequantized(density, logit_alpha=alpha)
    torch.testing.assert_close(flow.bits_per_dim(x, noise=u), expected, rtol=0, atol=1e-6)


def test_a_uniform_density_of_the_cube_has_log2_of_the_levels():
    base = dist.Uniform(torch.zeros(3).double(), torch.ones(3).double(), validate_args=False)
    density = FlowDistribution(base, ElementwiseAffine(3).double())
    flow = Dequantized(density, num_levels=8, logit_alpha=None)
    bits = flow.bits_per_dim(torch.randint(8, (5, 3)).double())
    torch.testing.assert_close(bits, torch.full((5,), 3.0).double())


def test_the_bound_rises_to_the_probability_of_the_cell():
    """P(x) = Φ(b) - Φ(a) over the cell, by the distribution function."""
    flow = Dequantized(normal_density(1, 0.4, 0.15), num_levels=4, logit_alpha=None)
    x = torch.arange(4.0).double().unsqueeze(-1)
    cells = torch.arange(5).double() / 4
    exact = dist.Normal(torch.tensor(0.4).double(), 0.15).cdf(cells).diff().log()
    with torch.no_grad():
        elbo = torch.stack([flow.log_prob(x) for _ in range(4000)])
        bound = flow.log_prob_bound(x, 20_000, chunk_size=5000)
    assert (elbo.mean(0) < exact + 3 * elbo.std(0) / 4000**0.5).all()
    assert (exact - elbo.mean(0)).sum() > 1
    torch.testing.assert_close(bound, exact, rtol=0, atol=0.1)


def test_the_objective_has_the_penalty_of_the_noisy_value(monkeypatch):
    """Of an identity flow: k = 1 keeps the first number of (x + u) / 4, and drops the others."""
    nested = NestedDropoutFlow(dist.Normal(torch.zeros(3), 1.0), ElementwiseAffine(3))
    flow = Dequantized(nested, num_levels=4, logit_alpha=None)
    monkeypatch.setattr(nested, "sample_index", lambda shape: torch.ones(shape, dtype=torch.long))
    x, u = torch.randint(4, (5, 3)).float(), torch.rand(5, 3)
    monkeypatch.setattr(flow, "_dequantize", lambda *_: (u, torch.zeros(5)))
    penalty = 20 * ((x + u) / 4)[:, 1:].square().sum(-1)
    torch.testing.assert_close(flow.objective(x), flow.log_prob(x) - penalty)
    with pytest.raises(ValueError, match="shape"):
        flow.objective(torch.zeros(2))


@pytest.mark.parametrize("kind", ["uniform", "variational"])
@pytest.mark.parametrize("event_shape", [(3,), (1, 2, 2)], ids=["vector", "image"])
def test_log_q_is_the_density_of_the_noise(kind, event_shape):
    """With a density that is constant, the importance-weighted bound is the log-volume of the cell: q integrates to one."""
    size = math.prod(event_shape)
    base = dist.Uniform(torch.zeros(event_shape).double(), 1.0, validate_args=False)
    base = base.to_event(len(event_shape))
    transform = (
        ElementwiseAffine(3)
        if len(event_shape) == 1
        else affine_coupling(event_shape, (4,), mask="checkerboard")
    )
    flow = Dequantized(
        FlowDistribution(base, transform.double()), kind, num_levels=5, logit_alpha=None
    ).double()
    if kind == "variational":
        torch.nn.init.normal_(flow.net[-1].bias[:size], std=0.2)
        torch.nn.init.constant_(flow.net[-1].bias[size:], 0.6)
    x = torch.randint(5, (2, *event_shape)).double()
    with torch.no_grad():
        bound = flow.log_prob_bound(x, 40_000, chunk_size=10_000)
    torch.testing.assert_close(
        bound, torch.full((2,), -size * math.log(5)).double(), rtol=0, atol=0.1
    )


def test_variational_noise_learns():
    flow = Dequantized(
        normal_density(1, 0.5, 0.05), "variational", num_levels=2, logit_alpha=None
    ).double()
    x = torch.tensor([[0.0], [1.0]]).double().repeat(50, 1)
    optimizer = torch.optim.Adam(flow.net.parameters(), lr=0.02)
    with torch.no_grad():
        start = flow.log_prob(x.repeat(20, 1)).mean()
    for _ in range(300):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        end = flow.log_prob(x.repeat(20, 1)).mean()
    assert start < end - 1  # uniform noise spends most of a cell where the density has no mass
    assert end < math.log(0.5)


def test_samples_are_whole_numbers_of_the_range():
    flow = Dequantized(normal_density(3, 0.0, 3.0), num_levels=4)
    x = flow.sample((200,))
    assert set(x.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert flow.support.check(x).all()
    assert flow.log_prob(x).isfinite().all()
    assert not flow.has_rsample
    assert not flow.exact_log_prob


def test_refusals():
    density = normal_density()
    with pytest.raises(ValueError, match="uniform, variational"):
        Dequantized(density, "gaussian")
    with pytest.raises(ValueError, match="expected none"):
        Dequantized(density, net=torch.nn.Linear(3, 6))
    with pytest.raises(TypeError, match="is a module"):
        Dequantized(dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError):
        Dequantized(density, validate_args=True).log_prob(torch.tensor([0.5, 1.0, 2.0]).double())


def conditional_density(dim=3):
    """N(context @ W, 1) by a context's affine layer, in float64."""
    transform = ElementwiseAffine(dim, context_dim=2)
    torch.nn.init.normal_(transform.hyper.net[-1].weight, std=0.5)
    return FlowDistribution(dist.Normal(torch.zeros(dim), 1.0).to_event(1), transform).double()


@pytest.mark.parametrize("logit_alpha", [None, 0.05], ids=["plain", "logit"])
@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_at_a_context_it_is_the_density_of_the_flow_there(kind, logit_alpha):
    torch.manual_seed(0)
    flow = conditional_density()
    whole = Dequantized(flow, kind, num_levels=5, logit_alpha=logit_alpha).double()
    context, x = torch.randn(4, 2).double(), torch.randint(5, (4, 3)).double()
    noise = torch.rand(4, 3).double()
    at = whole.condition(context)
    assert (whole.context_dim, at.context_dim, at.batch_shape) == (2, 0, (4,))
    found = at.bits_per_dim(x, noise)
    for row in range(4):
        one = Dequantized(
            flow.condition(context[row]), kind, num_levels=5, net=whole.net, logit_alpha=logit_alpha
        )
        torch.testing.assert_close(found[row], one.bits_per_dim(x[row], noise[row]))
    assert found.std() > 0.01
    assert at.sample((6,)).shape == (6, 4, 3)
    assert at.log_prob_bound(x, 3).shape == (4,)
    (-at.log_prob(x).sum()).backward()
    assert all(p.grad is not None for p in whole.parameters())


def test_a_context_is_refused_where_the_flow_takes_none():
    with pytest.raises(ValueError, match="expected a density with a context"):
        Dequantized(normal_density()).condition(torch.zeros(2).double())
