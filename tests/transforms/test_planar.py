"""Planar flows: the constraint, its extremes, and the formulas of Rezende & Mohamed."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.testing import integrate, perturb
from pyro_flows_ext.transforms import Planar, conditional_planar, planar


def set_parameters(transform, **values):
    with torch.no_grad():
        for name, value in values.items():
            parameter = getattr(transform, name)
            parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype).expand_as(parameter))
    return transform


def constrained(transform):
    """w, û and wᵀû of the (only) layer."""
    (w,), (u_hat,), k = transform._factors()
    return w.squeeze(0).detach(), u_hat.squeeze(0).detach(), k.squeeze().detach()


# --- the constraint ---


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e3])
def test_slope_is_positive_for_any_parameters(scale):
    for seed in range(20):
        transform = planar(4).double()
        generator = torch.Generator().manual_seed(seed)
        for p in transform.parameters():
            p.data = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        w, u_hat, k = constrained(transform)
        assert k > -1
        assert w @ u_hat == pytest.approx(k.item(), rel=1e-9, abs=1e-9 * scale**2)


def test_u_hat_is_u_where_the_constraint_holds():
    transform = set_parameters(planar(3), w=[1.0, 2.0, 0.0], u=[0.5, 0.1, 3.0])
    assert torch.equal(constrained(transform)[1], transform.u[0])


@pytest.mark.parametrize("u", [[0.0] * 3, [2.0, -1.0, 0.5], [-40.0, 40.0, 40.0]], ids=str)
def test_w_zero_is_a_shift(u):
    transform = set_parameters(planar(3).double(), w=0.0, u=u, b=0.3)
    x = torch.randn(5, 3, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, x + math.tanh(0.3) * torch.tensor(u, dtype=torch.float64))
    assert torch.equal(ladj, torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(transform.inverse_and_ladj(y)[0], x)
    for value, ladj in (transform.forward_and_ladj(x), transform.inverse_and_ladj(y)):
        grads = torch.autograd.grad(value.sum() + ladj.sum(), list(transform.parameters()))
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_u_hat_is_continuous_at_w_zero(sign):
    u = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for size in (1e-4, 1e-8, 1e-150, 1e-170, 1e-300):
        transform = set_parameters(planar(3).double(), w=sign * size, u=u)
        assert (constrained(transform)[1] - u).abs().max() <= 10 * size


def test_u_zero_is_the_identity():
    transform, x = set_parameters(planar(3), u=0.0), torch.randn(5, 3)
    y, ladj = transform.forward_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(5))


# --- extremes ---


def extreme(transform, size, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in transform.parameters():
            p.copy_(size * (2 * torch.randint(2, p.shape, generator=generator) - 1))
    return transform


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [1e-30, 5.0, 50.0])
def test_extreme_parameters(seed, size):
    transform = extreme(planar(3).double(), size, seed)
    x = 3 * torch.randn(50, 3, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    back, inverse_ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-5, atol=1e-5)
    unseen, _ = transform.inverse_and_ladj(x)
    torch.testing.assert_close(transform.forward_and_ladj(unseen)[0], x, rtol=1e-7, atol=1e-7)
    grads = torch.autograd.grad(ladj.sum() + unseen.sum(), list(transform.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [5.0, 50.0])
def test_extreme_parameters_stay_finite_in_float32(seed, size):
    transform = extreme(planar(3), size, seed)
    x = 3 * torch.randn(50, 3)
    for value, ladj in (transform.forward_and_ladj(x), transform.inverse_and_ladj(x)):
        assert value.isfinite().all()
        assert ladj.isfinite().all()
    unseen = transform.inverse_and_ladj(x)[0]
    torch.testing.assert_close(transform.forward_and_ladj(unseen)[0], x, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("far", [1e3, 1e8])
def test_values_far_out_come_back(far):
    transform = perturb(planar(3, num_layers=4).double())
    y = far * torch.randn(20, 3, dtype=torch.float64)
    x, ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(transform.forward_and_ladj(x)[0], y, rtol=1e-12, atol=1e-9)
    assert ladj.isfinite().all()


# --- what it starts as, and how it stacks ---


@pytest.mark.parametrize("num_layers", [1, 16])
@pytest.mark.parametrize("dim", [1, 2, 50])
def test_starts_near_the_identity(num_layers, dim):
    x = torch.randn(200, dim)
    y, ladj = planar(dim, num_layers=num_layers).forward_and_ladj(x)
    assert (y - x).square().mean().sqrt() < 0.05
    assert ladj.abs().max() < 0.5


def test_stack_is_its_layers_one_by_one():
    stack = perturb(planar(3, num_layers=4).double())
    x = torch.randn(5, 3, dtype=torch.float64)
    value, total = x, torch.zeros(5, dtype=torch.float64)
    for i in range(4):
        layer = planar(3).double()
        set_parameters(layer, w=stack.w[i], u=stack.u[i], b=stack.b[i])
        value, ladj = layer.forward_and_ladj(value)
        total = total + ladj
    torch.testing.assert_close(stack.forward_and_ladj(x), (value, total))
    torch.testing.assert_close(stack.inverse_and_ladj(value), (x, -total))


# --- against Pyro ---


def convert(theirs):
    """Our layer with the û of Pyro's: their softplus undone, our exponential linear unit applied the other way."""
    w, b = theirs.w.detach().double(), theirs.bias.detach().double()
    u_hat = theirs.u_hat(theirs.u, theirs.w).detach().double()
    k = w @ u_hat
    s = k if k >= 0 else (1 - 1e-3) * torch.log1p(k / (1 - 1e-3))
    return set_parameters(planar(len(w)).double(), w=w, u=u_hat + (s - k) / (w @ w) * w, b=b)


@pytest.mark.parametrize("seed", range(6))
def test_values_and_log_det_are_those_of_pyro_at_the_same_u_hat(seed):
    torch.manual_seed(seed)
    theirs = perturb(dist.transforms.Planar(3).double())
    ours = convert(theirs)
    x = torch.randn(20, 3, dtype=torch.float64)
    y = theirs(x)
    torch.testing.assert_close(ours(x), y)
    torch.testing.assert_close(
        ours.log_abs_det_jacobian(x, y), theirs.log_abs_det_jacobian(x, y), rtol=1e-6, atol=1e-7
    )
    unseen = torch.randn(20, 3, dtype=torch.float64)
    with pytest.raises(KeyError):
        theirs.inv(unseen)
    torch.testing.assert_close(theirs(ours.inv(unseen)), unseen)


# --- errors ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: planar(0), "input_dim: expected a positive integer, got 0"),
        (lambda: planar(2.5), "input_dim: expected a positive integer, got 2.5"),
        (
            lambda: planar(2, num_layers=-1),
            "num_layers: expected a positive integer, got -1",
        ),
        (lambda: conditional_planar(0, 2), "input_dim: expected a positive integer, got 0"),
    ],
    ids=["zero", "fraction", "negative", "conditional"],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(), (2,), (5, 4)], ids=str)
@pytest.mark.parametrize("method", ["forward_and_ladj", "inverse_and_ladj"])
def test_bad_shapes(method, shape):
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*, 3\), got"):
        getattr(planar(3), method)(torch.zeros(shape))


def test_repr():
    assert repr(planar(3, num_layers=2)) == "Planar(3, num_layers=2)"
    assert repr(planar(3).inv) == "Planar(3, num_layers=1).inv"


def test_helper_and_class_agree():
    torch.manual_seed(0)
    made = planar(3, num_layers=2)
    torch.manual_seed(0)
    for a, b in zip(made.parameters(), Planar(3, num_layers=2).parameters(), strict=True):
        assert torch.equal(a, b)


# --- training ---


def two_moons(num, generator):
    """Two half circles with Gaussian noise, about unit scale: (num, 2)."""
    angle = math.pi * torch.rand(num, generator=generator)
    upper = torch.rand(num, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, 2 * y], -1) + 0.1 * torch.randn(num, 2, generator=generator)


@pytest.mark.slow
def test_maximum_likelihood_on_two_moons():
    generator = torch.Generator().manual_seed(0)
    train, test = two_moons(1000, generator), two_moons(1000, generator)
    transform = planar(2, num_layers=16)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [transform])
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.02)
    for _ in range(200):
        batch = train[torch.randint(1000, (256,), generator=generator)]
        optimizer.zero_grad()
        (-density.log_prob(batch).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        gain = (density.log_prob(test) - base.log_prob(test)).mean().item()
    assert gain > 0.25
    assert integrate(density).item() == pytest.approx(1, abs=0.01)
