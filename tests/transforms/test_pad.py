"""Padding: the Gaussian bound against closed forms, and what zeros cannot give."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_flows_ext.transforms import LULinear, Pad


@pytest.fixture
def joint():
    """A normal over (x, ε), x of two dimensions and ε of one, with everything that follows from it in closed form."""
    A = torch.tensor([[1.2, 0.0, 0.0], [-0.7, 0.8, 0.0], [0.5, -0.4, 0.6]]).double()
    loc = torch.tensor([0.3, -0.2, 0.4]).double()
    return dist.MultivariateNormal(loc, A @ A.mT)


def marginal(joint):
    return dist.MultivariateNormal(joint.loc[:2], joint.covariance_matrix[:2, :2])


def conditional(joint, x):
    """p(ε | x)."""
    S = joint.covariance_matrix
    gain = torch.linalg.solve(S[:2, :2], S[:2, 2:])
    variance = S[2:, 2:] - S[2:, :2] @ gain
    return dist.MultivariateNormal(joint.loc[2:] + (x - joint.loc[:2]) @ gain, variance)


def test_equality_at_the_exact_conditional(joint):
    """Every single draw gives log p(x)."""
    x = torch.randn(40, 2).double()
    padded, log_q = Pad(1).pad(x, distribution=conditional(joint, x))
    assert torch.equal(padded[:, :2], x)
    torch.testing.assert_close(joint.log_prob(padded) - log_q, marginal(joint).log_prob(x))


def test_equality_for_standard_noise_where_that_is_the_conditional():
    S = torch.tensor([[1.5, 0.4, 0.0], [0.4, 0.7, 0.0], [0.0, 0.0, 1.0]]).double()
    joint = dist.MultivariateNormal(torch.zeros(3).double(), S)
    x = torch.randn(40, 2).double()
    padded, log_q = Pad(1).pad(x)
    torch.testing.assert_close(joint.log_prob(padded) - log_q, marginal(joint).log_prob(x))


def test_the_gap_is_the_divergence_to_the_conditional(joint):
    """E[log p(x, ε) - log q(ε)] = log p(x) - KL(q || p(ε | x)), below log p(x)."""
    x = torch.randn(5, 2).double()
    nodes, weights = hermite(20)
    # Quadrature in place of draws: exact, as the integrand is a quadratic.
    padded, log_q = Pad(1).pad(x, nodes.reshape(20, 1, 1))
    assert padded.shape == (20, 5, 3)
    assert log_q.shape == (20, 5)
    bound = (weights.unsqueeze(-1) * (joint.log_prob(padded) - log_q)).sum(0)
    exact, p = marginal(joint).log_prob(x), conditional(joint, x)
    sd = p.covariance_matrix[..., 0, 0].sqrt()
    gap = sd.log() + (1 + p.mean[:, 0] ** 2) / (2 * sd**2) - 0.5
    torch.testing.assert_close(bound, exact - gap)
    assert (bound < exact - 0.01).all()


def hermite(n):
    """Nodes and weights of E[f(ε)], ε standard normal, exact for polynomials below degree 2n (Golub & Welsch 1969)."""
    off = torch.arange(1, n).double().sqrt().diag(1)
    nodes, vectors = torch.linalg.eigh(off + off.mT)
    return nodes, vectors[0] ** 2


def test_average_weight_is_the_density(joint):
    x = torch.tensor([0.5, 0.1]).double()
    padded, log_q = Pad(1).pad(x.expand(200_000, 2))
    weights = (joint.log_prob(padded) - log_q).exp()
    error = weights.std() / math.sqrt(len(weights))
    assert abs(weights.mean() - marginal(joint).log_prob(x).exp()) < 5 * error
    assert error < 0.02 * weights.mean()


def test_noise_is_standard_normal_and_new_for_every_row():
    padded, log_q = Pad(3).pad(torch.zeros(4000, 2))
    noise = padded[:, 2:]
    torch.testing.assert_close(noise.mean(0), torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(noise.T.cov(), torch.eye(3), rtol=0, atol=0.1)
    torch.testing.assert_close(log_q, dist.Normal(0.0, 1.0).log_prob(noise).sum(-1))


def test_one_distribution_for_all_rows_gives_each_a_draw_of_its_own():
    q = dist.Normal(torch.tensor([3.0]), 0.1).to_event(1)
    padded, log_q = Pad(1).pad(torch.zeros(50, 2), distribution=q)
    assert log_q.shape == (50,)
    assert len(set(padded[:, 2].tolist())) == 50
    torch.testing.assert_close(padded[:, 2], torch.full((50,), 3.0), rtol=0, atol=0.6)


@pytest.mark.parametrize("kind", ["gaussian", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("event", "padded_event"), [((2,), (5,)), ((2, 4, 3), (5, 4, 3))], ids=["vector", "image"]
)
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)
def test_shapes(kind, dtype, event, padded_event, batch):
    pad, x = Pad(3, kind, event_dim=len(event)), torch.randn(*batch, *event, dtype=dtype)
    padded, log_q = pad.pad(x)
    assert padded.shape == (*batch, *padded_event)
    assert padded.dtype == dtype
    assert torch.equal(pad.unpad(padded), x)
    if kind == "zero":
        assert log_q is None
        assert not padded.movedim(-len(event), 0)[2:].any()
    else:
        assert log_q.shape == batch
        assert log_q.dtype == dtype


def test_given_noise_is_taken():
    x, noise = torch.randn(4, 2), torch.randn(4, 3)
    padded, log_q = Pad(3).pad(x, noise)
    assert torch.equal(padded, torch.cat([x, noise], -1))
    torch.testing.assert_close(log_q, dist.Normal(0.0, 1.0).log_prob(noise).sum(-1))


def test_gradients_reach_flow_and_noise():
    flow, scale = LULinear(3), nn.Parameter(torch.tensor([0.7]))
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    q = dist.Normal(torch.zeros(1), scale).to_event(1)
    padded, log_q = Pad(1).pad(torch.randn(6, 2), distribution=q)
    joint = dist.TransformedDistribution(base, [flow])
    (joint.log_prob(padded) - log_q).mean().backward()
    assert scale.grad.abs().item() > 0
    assert flow.lu.grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Pad(0), "num_pad: expected a positive integer, got 0"),
        (lambda: Pad(1, "uniform"), "kind: expected one of gaussian, zero; got 'uniform'"),
        (lambda: Pad(1, event_dim=2), "event_dim: expected 1 for vectors or 3 for images, got 2"),
        (lambda: Pad(1, event_dim=3).pad(torch.zeros(2, 2)), "x: expected 3 event dimensions"),
        (
            lambda: Pad(2).pad(torch.zeros(4, 2), torch.zeros(4, 3)),
            r"noise: expected shape \(\*, 2\), got \(4, 3\)",
        ),
        (
            lambda: Pad(2).pad(torch.zeros(2), distribution=dist.Normal(0.0, 1.0)),
            r"distribution: expected event_shape \(2,\), got \(\)",
        ),
        (
            lambda: Pad(1, "zero").pad(torch.zeros(4, 2), torch.zeros(4, 1)),
            "noise, distribution: expected none for kind='zero'",
        ),
        (lambda: Pad(2).unpad(torch.zeros(4, 2)), "z: expected more than 2 elements"),
        (lambda: Pad(2, event_dim=3).unpad(torch.zeros(4, 4)), "z: expected more than 2 elements"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_repr():
    assert repr(Pad(2)) == "Pad(2, kind='gaussian', event_dim=1)"
