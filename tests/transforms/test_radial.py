"""Radial flows: the constraint, the centre, the far field, and the formulas of Rezende & Mohamed."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import conditional_radial, radial


def make(dim=3, *, x0=0.0, alpha_raw=1.0, beta_raw=0.5):
    """A layer in float64 with these raw parameters, its α and its β."""
    transform = radial(dim).double()
    with torch.no_grad():
        transform.x0.copy_(torch.as_tensor(x0, dtype=torch.float64))
        transform.alpha_raw.fill_(alpha_raw)
        transform.beta_raw.fill_(beta_raw)
    _, (alpha,), (beta,) = transform._layers()
    return transform, alpha.item(), beta.item()


RAW = [-50.0, -3.0, 0.0, 3.0, 50.0]


@pytest.mark.parametrize("alpha_raw", RAW)
@pytest.mark.parametrize("beta_raw", RAW)
def test_extreme_parameters(alpha_raw, beta_raw):
    transform, alpha, beta = make(alpha_raw=alpha_raw, beta_raw=beta_raw)
    assert alpha > 0
    assert beta > -alpha
    x = torch.randn(50, 3, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    back, inverse_ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-7, atol=1e-7)
    unseen, inverse_ladj = transform.inverse_and_ladj(x)
    torch.testing.assert_close(transform.forward_and_ladj(unseen)[0], x, rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(
        unseen.sum() + inverse_ladj.sum() + ladj.sum(), list(transform.parameters())
    )
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("alpha_raw", RAW)
@pytest.mark.parametrize("beta_raw", RAW)
def test_extreme_parameters_stay_finite_in_float32(alpha_raw, beta_raw):
    transform = make(alpha_raw=alpha_raw, beta_raw=beta_raw)[0].float()
    x = 3 * torch.randn(50, 3)
    for value, ladj in (transform.forward_and_ladj(x), transform.inverse_and_ladj(x)):
        assert value.isfinite().all()
        assert ladj.isfinite().all()


@pytest.mark.parametrize("beta_raw", RAW)
@pytest.mark.parametrize("method", ["forward_and_ladj", "inverse_and_ladj"])
def test_the_centre_stays_with_a_finite_gradient(method, beta_raw):
    transform, alpha, beta = make(x0=[0.3, -1.0, 2.0], beta_raw=beta_raw)
    centre = transform.x0.detach()[0].clone().requires_grad_()
    value, ladj = getattr(transform, method)(centre)
    assert torch.equal(value, centre)
    expected = 3 * math.log1p(beta / alpha) * (1 if method == "forward_and_ladj" else -1)
    assert ladj.item() == pytest.approx(expected, rel=1e-9)
    grads = torch.autograd.grad(value.sum() + ladj.sum(), [centre, *transform.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("far", [1e3, 1e8])
@pytest.mark.parametrize("beta_raw", [-5.0, 5.0])
def test_values_far_out_come_back(far, beta_raw):
    transform, _, beta = make(beta_raw=beta_raw)
    y = far * torch.randn(20, 3, dtype=torch.float64)
    x, ladj = transform.inverse_and_ladj(y)
    # Far out the map is a shift by β along the radius.
    torch.testing.assert_close(
        (y - x).norm(dim=-1), torch.full((20,), abs(beta)).double(), rtol=0.05, atol=0
    )
    torch.testing.assert_close(transform.forward_and_ladj(x)[0], y, rtol=1e-13, atol=1e-10)
    assert ladj.abs().max() < 50 / far


@pytest.mark.parametrize("num_layers", [1, 16])
@pytest.mark.parametrize("dim", [1, 2, 50])
def test_starts_near_the_identity(num_layers, dim):
    x = torch.randn(200, dim)
    y, ladj = radial(dim, num_layers=num_layers).forward_and_ladj(x)
    assert (y - x).square().mean().sqrt() < 0.05
    assert ladj.abs().max() < 0.02 * dim * num_layers


def test_beta_zero_is_the_identity():
    transform, x = make(beta_raw=0.0)[0], torch.randn(5, 3, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, x)
    assert torch.equal(ladj, torch.zeros(5, dtype=torch.float64))


def test_stack_is_its_layers_one_by_one():
    stack = perturb(radial(3, num_layers=4).double())
    x = torch.randn(5, 3, dtype=torch.float64)
    value, total = x, torch.zeros(5, dtype=torch.float64)
    for i in range(4):
        layer = radial(3).double()
        layer.load_state_dict({name: p[i : i + 1] for name, p in stack.state_dict().items()})
        value, ladj = layer.forward_and_ladj(value)
        total = total + ladj
    torch.testing.assert_close(stack.forward_and_ladj(x), (value, total))
    torch.testing.assert_close(stack.inverse_and_ladj(value), (x, -total))


@pytest.mark.parametrize("alpha_raw", [-2.0, 1.0])
@pytest.mark.parametrize("beta_raw", [-2.0, 0.0, 2.0])
def test_values_and_log_det_are_those_of_pyro_at_the_same_alpha_and_beta(alpha_raw, beta_raw):
    x0 = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
    ours, alpha, beta = make(x0=x0, alpha_raw=alpha_raw, beta_raw=beta_raw)
    theirs = dist.transforms.Radial(3).double()
    # Theirs: α = softplus(alpha_prime), β = softplus(beta_prime) - α.
    with torch.no_grad():
        theirs.x0.copy_(x0)
        theirs.alpha_prime.fill_(math.log(math.expm1(alpha)))
        theirs.beta_prime.fill_(math.log(math.expm1(alpha + beta)))
    x = torch.randn(20, 3, dtype=torch.float64)
    y = theirs(x)
    torch.testing.assert_close(ours(x), y)
    torch.testing.assert_close(ours.log_abs_det_jacobian(x, y), theirs.log_abs_det_jacobian(x, y))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: radial(0), "input_dim: expected a positive integer, got 0"),
        (lambda: radial(2, num_layers=0), "num_layers: expected a positive integer, got 0"),
        (
            lambda: conditional_radial(2, 2, num_layers=0),
            "num_layers: expected a positive integer, got 0",
        ),
        (
            lambda: radial(3).forward_and_ladj(torch.zeros(5, 2)),
            r"x: expected a tensor of shape \(\*, 3\), got \(5, 2\)",
        ),
        (
            lambda: radial(3).inverse_and_ladj(torch.zeros(())),
            r"y: expected a tensor of shape \(\*, 3\), got \(\)",
        ),
    ],
    ids=["input-dim", "num-layers", "conditional", "x", "y"],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_repr():
    assert repr(radial(3, num_layers=2)) == "Radial(3, num_layers=2)"
