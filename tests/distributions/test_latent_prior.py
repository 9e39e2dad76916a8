"""The flow with a learned low-dimensional base: a bound on a closed form, draws, codes."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_flows_ext.distributions.latent_prior import FlowVAE
from pyro_flows_ext.transforms import ElementwiseAffine, Squeeze, nsf


class Linear(nn.Module):
    """(location, raw log-scale) with a linear location and a constant scale."""

    def __init__(self, weight, log_scale):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(weight).double())
        self.log_scale = nn.Parameter(torch.as_tensor(log_scale).double())

    def forward(self, x):
        loc = x @ self.weight.T
        return torch.cat([loc, self.log_scale.expand_as(loc)], -1)


def raw(log_scale):
    """What the bounded scale, log 1000 tanh(raw / log 1000), makes `log_scale` of."""
    c = math.log(1000)
    return c * math.atanh(log_scale / c)


W = torch.tensor([[2.0], [-1.0]]).double()
SIGMA = 0.5


def factor_model(exact_encoder=True):
    """z = W ε + σ noise: z ~ N(0, W Wᵀ + σ² I), and ε | z is normal."""
    precision = 1 + (W.T @ W).item() / SIGMA**2
    gain = W.T / SIGMA**2 / precision if exact_encoder else torch.zeros(1, 2).double()
    log_scale = -0.5 * math.log(precision) if exact_encoder else 0.0
    transform = ElementwiseAffine(2).double()
    nn.init.constant_(transform.loc, 1.0)
    flow = FlowVAE(
        transform,
        2,
        1,
        encoder=Linear(gain, [raw(log_scale)]),
        decoder=Linear(W, [raw(math.log(SIGMA))] * 2),
    )
    exact = dist.MultivariateNormal(
        torch.ones(2).double(), W @ W.T + SIGMA**2 * torch.eye(2).double()
    )
    return flow, exact


def test_the_bound_is_exact_with_the_exact_encoder():
    flow, exact = factor_model()
    x = exact.sample((50,))
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x), rtol=1e-5, atol=1e-5)


def test_the_bound_rises_with_the_particles():
    flow, exact = factor_model(exact_encoder=False)
    x = exact.sample((20,))
    with torch.no_grad():
        bounds = [flow.log_prob_bound(x, k, chunk_size=1000).mean().item() for k in (1, 10, 5000)]
    assert bounds[0] < bounds[1] < bounds[2] + 0.01
    assert bounds[2] == pytest.approx(exact.log_prob(x).mean().item(), abs=0.05)


def test_draws_have_the_moments_of_the_density():
    flow, exact = factor_model()
    draws = flow.sample((40_000,))
    torch.testing.assert_close(draws.mean(0), exact.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.T.cov(), exact.covariance_matrix, rtol=0, atol=0.1)


def test_codes_and_interpolation():
    flow, exact = factor_model()
    start, end = exact.sample((3,)), exact.sample((3,))
    path = flow.interpolate(start, end, num=5)
    assert path.shape == (5, 3, 2)
    torch.testing.assert_close(path[0], flow.decode(flow.encode(start)))
    torch.testing.assert_close(path[-1], flow.decode(flow.encode(end)))
    assert torch.linalg.matrix_rank((path - 1).reshape(-1, 2), tol=1e-9) == 1  # on the line W ε


def test_default_networks_have_a_gradient_from_the_start_and_train():
    torch.manual_seed(0)
    _, exact = factor_model()
    x = exact.sample((200,)).float()
    flow = FlowVAE(nsf(2, num_layers=1), 2, 1, hidden_dims=(16,))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    values = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        values.append(loss.item())
        optimizer.step()
    assert flow.decoder[-1].weight.grad.abs().max() > 0
    assert values[-1] < values[0] - 0.5
    assert -values[-1] < exact.log_prob(x.double()).mean() + 0.3


def test_refusals():
    with pytest.raises(ValueError, match="encoder: expected"):
        FlowVAE(nsf(2), 2, 1, encoder=nn.Linear(2, 3))
    with pytest.raises(ValueError, match="decoder: expected"):
        FlowVAE(nsf(2), 2, 1, decoder=nn.Linear(1, 2))
    with pytest.raises(ValueError, match="one of vectors"):
        FlowVAE(Squeeze(2), 4, 1)
    with pytest.raises(TypeError, match="FlowTransform"):
        FlowVAE(nn.Linear(2, 2), 2, 1)
    with pytest.raises(ValueError, match=r"shape \(\*, 2\)"):
        FlowVAE(nsf(2), 2, 1).log_prob(torch.zeros(3))
