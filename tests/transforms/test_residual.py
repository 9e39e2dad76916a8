"""Residual flows: exact log-dets, inverses at any dimension, images, and networks of one's own."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from residual_flows import (
    D,
    exact_noise,
    jacobian_norm,
    ladj_of,
    leaves_of,
    made,
    made_exact,
    normal,
)

import pyro_flows_ext.ops.contraction as contraction
from pyro_flows_ext.nn import LipschitzMLP
from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import LogDetNoise, ResidualFlow

# --- exact log-dets ---


def test_the_tests_are_about_long_series():
    assert 0.5 < jacobian_norm(made(), normal(100)) <= 0.97


@pytest.mark.parametrize(
    ("dim", "train", "exact_log_det", "is_exact"),
    [
        (3, False, None, True),
        (16, False, None, True),
        (17, False, None, False),
        (3, True, None, False),
        (3, True, True, True),
        (17, True, True, True),
        (3, False, False, False),
    ],
)
def test_when_the_log_det_is_exact(dim, train, exact_log_det, is_exact):
    transform = made(dim, (4,), train=train, exact_log_det=exact_log_det)
    x = torch.randn(4, dim, dtype=torch.float64)
    first, second = (transform.forward_and_ladj(x)[1] for _ in range(2))
    assert torch.equal(first, second) == is_exact
    if is_exact:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: transform.forward_and_ladj(x)[0]))
        torch.testing.assert_close(first, torch.linalg.slogdet(jacobian(x)).logabsdet)


# --- inverses ---


@pytest.mark.parametrize("dim", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_round_trip_with_aligned_layers(dim, dtype):
    transform = made(dim, (2 * dim,)).to(dtype)
    y = 3 * torch.randn(50, dim, dtype=dtype)
    x = transform.inv(y)
    error = (transform.forward_and_ladj(x)[0] - y).abs().max()
    assert error < 200 * torch.finfo(dtype).eps


def test_large_and_small_events_agree(monkeypatch):
    """Newton's method with its chord steps, against Anderson acceleration with the implicit gradient."""
    transform = made(exact_log_det=True)
    y = normal(5).requires_grad_()
    weight = normal(5)
    results = []
    for limit in (0, 100):
        monkeypatch.setattr(contraction, "NEWTON_DIM", limit)
        x, ladj = transform.inverse_and_ladj(y)
        grads = torch.autograd.grad(
            (weight * x).sum() + (weight[:, 0] * ladj).sum(), leaves_of(transform, y)
        )
        results.append([x, ladj, *grads])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_gradients_at_20_dimensions():
    transform = made(20, (6,), exact_log_det=True)
    y = torch.randn(2, 20, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(transform.inverse_and_ladj, y, fast_mode=True)


def test_inverse_at_20_dimensions_where_no_value_may_be_looked_at():
    transform = made(20, (6,), exact_log_det=True)
    y = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    x, ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(
        torch.func.vmap(transform.inverse_and_ladj)(y), (x, ladj), rtol=1e-10, atol=1e-10
    )
    expected = torch.autograd.grad(ladj.sum(), y)[0]
    actual = torch.func.vmap(torch.func.grad(ladj_of(transform, inverse=True)))(y)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# The forward-mode formulas of torch warn when they are first loaded.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_second_derivatives_of_the_inverse():
    """∂²/∂y² log|det Df⁻¹(y)| under torch.func against differences of the first."""
    transform, y = made(), normal()
    gradient = torch.func.grad(ladj_of(transform, inverse=True))
    hessian = torch.func.hessian(ladj_of(transform, inverse=True))(y)
    h = 1e-5
    for i, e in enumerate(torch.eye(D, dtype=torch.float64)):
        difference = (gradient(y + h * e) - gradient(y - h * e)) / (2 * h)
        torch.testing.assert_close(hessian[i], difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rows_do_not_leak_into_each_other(inverse):
    transform, x = made(), normal(4)
    x[1], x[2] = torch.nan, 1e9 * x[2]
    run = transform.inverse_and_ladj if inverse else transform.forward_and_ladj
    out, ladj = run(x)
    assert out[1].isnan().any()
    for i in (0, 2, 3):
        torch.testing.assert_close((out[i], ladj[i]), run(x[i]), rtol=1e-10, atol=1e-10)


# --- the start ---


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [3, (2, 3, 3)], ids=str)
def test_starts_at_the_identity_with_a_gradient(shape, train):
    transform = ResidualFlow(shape, (5, 5)).train(train)
    x = torch.randn(4, *transform.event_shape)
    for method in ("forward_and_ladj", "inverse_and_ladj"):
        out, ladj = getattr(transform, method)(x)
        torch.testing.assert_close(out, x)
        torch.testing.assert_close(ladj, torch.zeros(4))
        for loss in ((out * x).sum(), ladj.sum()):
            grad = torch.autograd.grad(loss, transform.net.layers[-1].weight, retain_graph=True)[0]
            assert grad.abs().max() > 0


# --- images ---


def test_images():
    transform = perturb(ResidualFlow((2, 3, 3), (4,)).double(), scale=3.0)
    for space in (transform.domain, transform.codomain):
        assert space.event_dim == 3
        assert space.base_constraint is constraints.real
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    exact = made_exact(transform)
    y, ladj = exact.forward_and_ladj(x)
    assert ladj.shape == (4,)
    flat = torch.func.vmap(
        torch.func.jacrev(lambda x: exact.forward_and_ladj(x.reshape(2, 3, 3))[0].flatten())
    )
    torch.testing.assert_close(ladj, torch.linalg.slogdet(flat(x.flatten(1))).logabsdet)
    back, ladj_back = exact.inverse_and_ladj(y)  # 18 numbers: by Anderson acceleration
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ladj_back, -ladj, rtol=1e-11, atol=1e-11)
    noise = transform.draw_noise(x)
    assert noise.v.shape == (1, 4, 2, 3, 3)
    view = transform.with_noise(
        LogDetNoise(18**0.5 * torch.eye(18, dtype=x.dtype).reshape(18, 2, 3, 3), (1.0,) * 400)
    )
    torch.testing.assert_close(view.forward_and_ladj(x)[1], ladj, rtol=1e-9, atol=1e-9)


def test_images_with_a_context():
    conditional = perturb(ResidualFlow((1, 2, 3), (4,), context_dim=2).double()).eval()
    context = torch.randn(5, 2, dtype=torch.float64)
    transform = conditional.condition(context)
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    assert y.shape == (5, 1, 2, 3)
    assert ladj.shape == (5,)
    torch.testing.assert_close(transform.inv(y), x.expand(5, 1, 2, 3), rtol=1e-10, atol=1e-10)
    assert (y[0] - y[1]).abs().max() > 1e-3


# --- a network of one's own ---


class Own(torch.nn.Module):
    def __init__(self, context_dim=0):
        super().__init__()
        self.linear = torch.nn.Linear(D, D).double()
        self.shift = torch.nn.Linear(context_dim, D).double() if context_dim else None

    def forward(self, x, context=None):
        shift = 0 if context is None else self.shift(context)
        return 0.3 * torch.tanh(self.linear(x) + shift)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_any_network():
    transform = ResidualFlow(D, net=Own(), lipschitz=0.6).eval()
    x = normal(4)
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, x + transform.net(x))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: x + transform.net(x)))(x)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(transform.inverse_and_ladj(y)[0], x, rtol=1e-11, atol=1e-11)
    view = transform.with_noise(exact_noise(80))
    torch.testing.assert_close(view.forward_and_ladj(x)[1], ladj)
    grads = [
        torch.autograd.grad(t.forward_and_ladj(x)[1].sum(), transform.net.parameters())
        for t in (view, transform)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_any_network_with_a_context():
    conditional = ResidualFlow(D, net=Own(context_dim=2), lipschitz=0.6, context_dim=2).eval()
    context, x = torch.randn(4, 2, dtype=torch.float64), normal(4)
    y, _ = conditional.condition(context).forward_and_ladj(x)
    torch.testing.assert_close(y, x + conditional.net(x, context))


def test_a_network_that_says_how_lipschitz_it_is():
    transform = ResidualFlow(D, net=LipschitzMLP(D, (4,), lipschitz=0.4))
    assert transform.lipschitz == 0.4


def test_a_network_that_is_no_contraction_is_found_out():
    net = torch.nn.Linear(20, 20)
    with torch.no_grad():
        net.weight.copy_(-2 * torch.eye(20).roll(1, 0))
    with pytest.raises(RuntimeError, match="plain steps do not converge"):
        ResidualFlow(20, net=net).inv(torch.randn(3, 20))


# --- use ---


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["estimated", "exact"])
def test_learns_a_density(train):
    """By maximum likelihood, from samples of a density whose second variable swings with the first."""
    transform = ResidualFlow(2, (32, 32)).train(train)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = dist.TransformedDistribution(base, [transform.inv])

    def draw(n):
        first = torch.randn(n, 1)
        return torch.cat([first, 0.8 * torch.randn(n, 1) + 0.6 * torch.sin(1.5 * first)], -1)

    optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        (-flow.log_prob(draw(256)).mean()).backward()
        optimizer.step()
    transform.eval()
    x = draw(10_000)
    with torch.no_grad():
        loss = -flow.log_prob(x).mean().item()
    entropy = math.log(2 * math.pi * math.e) + math.log(0.8)
    independent = math.log(2 * math.pi * math.e) + math.log(x[:, 1].std().item())
    assert independent - entropy > 0.1
    assert entropy - 0.04 < loss < entropy + 0.06


def test_repr():
    assert repr(ResidualFlow(3)) == "ResidualFlow(3, lipschitz=0.97)"
    assert (
        repr(ResidualFlow((1, 4, 4), lipschitz=0.5, exact_log_det=True))
        == "ResidualFlow((1, 4, 4), lipschitz=0.5, exact_log_det=True)"
    )
    assert repr(ResidualFlow(3, context_dim=2)) == "ResidualFlow(3, lipschitz=0.97, context_dim=2)"


def test_errors():
    for run in (ResidualFlow(3).forward_and_ladj, ResidualFlow(3).inverse_and_ladj):
        with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*, 3\), got \(5, 2\)"):
            run(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"x: expected a tensor of shape \(\*, 1, 2, 2\)"):
        ResidualFlow((1, 2, 2)).forward_and_ladj(torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"input_dim: expected D or \(C, H, W\)"):
        ResidualFlow((2, 2))
    with pytest.raises(ValueError, match="input_dim: expected a positive integer, got 0"):
        ResidualFlow(0)
    with pytest.raises(ValueError, match="lipschitz: expected a number between 0 and 1"):
        ResidualFlow(3, lipschitz=1.0)
    with pytest.raises(ValueError, match="lipschitz: expected a number between 0 and 1"):
        ResidualFlow(3, net=Own(), lipschitz=1.5)
    with pytest.raises(ValueError, match="continue_prob: expected a number between 0 and 1"):
        ResidualFlow(3, continue_prob=1.0)
    with pytest.raises(ValueError, match="num_exact_terms: expected a positive integer, got 0"):
        ResidualFlow(3, num_exact_terms=0)
    with pytest.raises(ValueError, match="num_probes: expected a positive integer, got 0"):
        ResidualFlow(3, num_probes=0)
    with pytest.raises(ValueError, match="hidden_dims: these belong to the default network"):
        ResidualFlow(3, (4,), net=Own())
    with pytest.raises(
        ValueError, match=r"ResidualFlow: expected a call of condition\(context\) first"
    ):
        ResidualFlow(3, context_dim=2)(torch.randn(5, 3))
    with pytest.raises(ValueError, match="noise: expected none, since exact_log_det=True"):
        ResidualFlow(3, exact_log_det=True).with_noise(exact_noise())
