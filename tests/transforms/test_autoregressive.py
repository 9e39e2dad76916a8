"""Autoregressive flows: the triangle, both orientations, and an inverse by sweeps that equals one by substitution."""

import math

import pyro.distributions as dist
import pytest
import torch
from autoregressive_layers import CONDITIONAL, KINDS, MAKE, ORDER, made, normal, train

from pyro_flows_ext.testing import POINTS, perturb
from pyro_flows_ext.transforms import (
    Autoregressive,
    RationalQuadratic,
    affine_autoregressive,
    autoregressive,
    conditional_affine_autoregressive,
    spline_autoregressive,
)

VARIANTS = {
    "order": lambda: affine_autoregressive(3, (5,), order=[1, 2, 0]),
    "linear": lambda: affine_autoregressive(3, ()),
    "deep": lambda: affine_autoregressive(3, (6, 6, 6, 4), activation=torch.nn.ELU),
    "spline-1d": lambda: spline_autoregressive(1, (4,)),
    "spline-one-bin": lambda: spline_autoregressive(3, (4,), num_bins=1),
}


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("number", [1, 2, 3, 5, 7, 8])
def test_contract_of_variants(make, number):
    for dtype in POINTS[number].dtypes:
        POINTS[number].check(make, dtype=dtype)


def substituted(transform, y, order, context=None):
    """f⁻¹(y) and its log-det one variable at a time, in view of autograd."""
    bound = transform if context is None else transform.condition(context)
    x = [torch.zeros(y.shape[:-1], dtype=y.dtype)] * y.shape[-1]
    for i in order:
        theta = bound.net(torch.stack(x, -1), context)
        x[i] = bound.transformer.inverse(y, theta)[0][..., i]
    x = torch.stack(x, -1)
    return x, -bound.forward_and_ladj(x)[1]


@KINDS
@pytest.mark.parametrize("order", [None, ORDER], ids=["default", "mixed"])
def test_jacobian_is_triangular_in_the_order(kind, order):
    transform = made(kind, order=order)
    jacobian = torch.func.jacrev(lambda x: transform.forward_and_ladj(x)[0])
    order = list(range(4)) if order is None else order
    for x in torch.randn(10, 4, dtype=torch.float64):
        J = jacobian(x)[order][:, order]
        assert torch.equal(J, J.tril())
        assert (J.diagonal() > 0).all()


@KINDS
@pytest.mark.parametrize("conditional", [False, True], ids=["plain", "context"])
def test_starts_at_the_identity(kind, conditional):
    transform = MAKE[kind](3)
    if conditional:
        transform = CONDITIONAL[kind](3, 2).condition(torch.randn(5, 2))
    x = 4 * torch.randn(5, 3)
    for value, ladj in (transform.forward_and_ladj(x), transform.inverse_and_ladj(x)):
        torch.testing.assert_close(value, x)
        torch.testing.assert_close(ladj, torch.zeros(5), rtol=0, atol=1e-5)


def test_affine_is_its_formula():
    transform = made("affine")
    x = torch.randn(5, 4, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    mu, s = transform.net(x).unbind(-2)
    log_sigma = math.log(1000) * (s / math.log(1000)).tanh()
    torch.testing.assert_close(y, mu + log_sigma.exp() * x)
    torch.testing.assert_close(ladj, log_sigma.sum(-1))


@pytest.mark.parametrize("raw", [-1e6, -30.0, 30.0, 1e6])
def test_scale_is_bounded_and_keeps_its_gradient(raw):
    transform = affine_autoregressive(2, (4,)).double()
    with torch.no_grad():
        transform.net.layers[-1].bias[2:] = raw
    x = torch.randn(5, 2, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    assert (ladj.abs() <= 2 * math.log(1000) + 1e-12).all()
    torch.testing.assert_close(transform.inverse_and_ladj(y)[0], x)
    (grad,) = torch.autograd.grad(ladj.sum(), transform.net.layers[-1].bias)
    assert (grad[2:] != 0).all() or abs(raw) == 1e6


@KINDS
@pytest.mark.parametrize("scale", [0.7, 4.0])
@pytest.mark.parametrize("conditional", [False, True], ids=["plain", "context"])
def test_inverse_and_its_gradients_are_those_of_substitution(kind, scale, conditional):
    context_dim = 2 if conditional else 0
    transform = MAKE[kind](4, (16,), order=ORDER, context_dim=context_dim).double()
    perturb(transform, scale=scale)
    context = torch.randn(6, 2, dtype=torch.float64).requires_grad_() if conditional else None
    bound = transform.condition(context) if conditional else transform
    y = (2 * torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    leaves = [y, *transform.parameters(), *([context] if conditional else [])]
    weight, weight_ladj = torch.randn_like(y), torch.randn(6, dtype=torch.float64)
    results = []
    for x, ladj in (bound.inverse_and_ladj(y), substituted(transform, y, ORDER, context)):
        loss = (weight * x).sum() + (weight_ladj * ladj).sum()
        results.append([x, ladj, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@KINDS
def test_without_a_graph_the_inverse_is_the_same(kind):
    transform, y = made(kind), torch.randn(6, 4, dtype=torch.float64)
    expected = [t.detach() for t in transform.inverse_and_ladj(y)]
    with torch.no_grad():
        torch.testing.assert_close(list(transform.inverse_and_ladj(y)), expected)


@pytest.fixture
def sweeps(monkeypatch):
    """A list that grows by one with every sweep of an inverse."""
    counts, solve = [], autoregressive.triangular_fixed_point

    def counted(step, start, max_sweeps, substitute):
        def run(x):
            counts.append(tuple(x.shape))
            return step(x)

        return solve(run, start, max_sweeps)

    monkeypatch.setattr(autoregressive, "triangular_fixed_point", counted)
    return counts


@KINDS
@pytest.mark.parametrize(
    ("dim", "scale", "most"), [(64, 0.0, 2), (64, 0.7, 40), (8, 6.0, 8)], ids=["0", "0.7", "6"]
)
def test_number_of_sweeps(kind, dim, scale, most, sweeps):
    transform = perturb(MAKE[kind](dim).double(), scale=scale)
    y = torch.randn(100, dim, dtype=torch.float64)
    with torch.no_grad():
        x, _ = transform.inverse_and_ladj(y)
        torch.testing.assert_close(transform.forward_and_ladj(x)[0], y, rtol=1e-9, atol=1e-9)
    assert 2 <= len(sweeps) <= most
    assert sweeps[0] == (1, dim), "the first sweep is over one row"


def test_far_fewer_sweeps_than_variables_after_training(sweeps):
    """A masked autoregressive flow of 64 variables, each half of the one before it and noise."""
    dim = 64
    step = torch.arange(dim)
    rows = (step.unsqueeze(-1) - step).clamp_min(0)
    density = dist.MultivariateNormal(torch.zeros(dim), scale_tril=(0.5**rows).tril())
    transform = affine_autoregressive(dim, (64,))
    flow = dist.TransformedDistribution(normal(dim), [transform.inv])
    train(transform, lambda: -flow.log_prob(density.sample((128,))).mean(), 150, lr=1e-2)
    assert not sweeps, "scoring is one pass"
    x = density.sample((1000,))
    independent = normal(dim).log_prob(x / density.stddev).mean() - density.stddev.log().sum()
    with torch.no_grad():
        assert flow.log_prob(x).mean() > independent + 3
        flow.sample((200,))
    assert len(sweeps) <= dim // 2


@KINDS
def test_rows_do_not_leak_into_each_other(kind):
    transform = made(kind, scale=3.0)
    y = torch.randn(4, 4, dtype=torch.float64)
    y[1], y[2] = torch.nan, 1e12 * y[2]
    x, ladj = transform.inverse_and_ladj(y)
    assert x[1].isnan().any()
    for i in (0, 2, 3):
        alone = transform.inverse_and_ladj(y[i])
        torch.testing.assert_close((x[i], ladj[i]), alone, rtol=1e-12, atol=1e-12)


def test_memory_does_not_grow_with_the_sweeps(sweeps):
    sizes = {}
    for scale in (0.0, 0.7, 6.0):
        transform = perturb(affine_autoregressive(16).double(), scale=scale)
        y, saved = torch.randn(8, 16, dtype=torch.float64), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            before = len(sweeps)
            transform.inverse_and_ladj(y)
            sizes[len(sweeps) - before] = sum(saved)
    assert len(sizes) == 3, "numbers of sweeps that differ"
    assert len(set(sizes.values())) == 1


# --- use ---


@KINDS
def test_order_of_a_saved_transform_comes_with_it(kind):
    transform, other = made(kind, order=ORDER), made(kind)
    other.load_state_dict(transform.state_dict())
    y = torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(other.inverse_and_ladj(y)[0], transform.inverse_and_ladj(y)[0])


def test_repr():
    assert repr(affine_autoregressive(3)) == "Autoregressive(3, transformer=Affine())"
    assert repr(spline_autoregressive(3)) == (
        "Autoregressive(3, transformer=RationalQuadratic(num_bins=8, bound=3))"
    )
    assert (
        repr(conditional_affine_autoregressive(3, 2))
        == "Autoregressive(3, transformer=Affine(), context_dim=2)"
    )


def test_options_reach_the_network():
    transform = Autoregressive(3, (4, 5), order=[2, 1, 0], activation=torch.nn.ReLU, residual=False)
    assert [layer.out_features for layer in transform.net.layers] == [4, 5, 6]
    assert transform.net.order.tolist() == [2, 1, 0]
    assert isinstance(transform.net.activation, torch.nn.ReLU)
    assert not transform.net.residual
    conditional = conditional_affine_autoregressive(3, 2, (4,), order=[2, 1, 0])
    assert conditional.net.order.tolist() == [2, 1, 0]


def test_errors():
    x = torch.randn(5, 2, requires_grad=True)
    transform = affine_autoregressive(3)
    for run in (transform.forward_and_ladj, transform.inverse_and_ladj):
        with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*, 3\), got \(5, 2\)"):
            run(x)
    with pytest.raises(ValueError, match="input_dim: expected a positive integer, got 0"):
        affine_autoregressive(0)
    with pytest.raises(ValueError, match="order: expected a permutation"):
        affine_autoregressive(3, order=[0, 1])
    with pytest.raises(ValueError, match="num_bins: expected a positive integer, got 0"):
        spline_autoregressive(3, num_bins=0)
    with pytest.raises(ValueError, match="bound: expected a positive number, got -1"):
        spline_autoregressive(3, bound=-1)
    with pytest.raises(ValueError, match="context_dim: expected a positive integer, got 0"):
        conditional_affine_autoregressive(3, 0)
    with pytest.raises(ValueError, match=r"expected a call of condition\(context\) first"):
        conditional_affine_autoregressive(2, 2)(x)
    with pytest.raises(TypeError, match="transformer: expected a Transformer"):
        Autoregressive(2, transformer=lambda x, theta: x)
    with pytest.raises(RuntimeError, match="take second derivatives with"):
        torch.autograd.grad(affine_autoregressive(2).inv(x).sum(), x, create_graph=True)


def test_second_derivatives_of_the_inverse_under_func():
    transform = made("affine")
    y = torch.randn(4, dtype=torch.float64)
    hessians = [
        torch.func.jacrev(torch.func.jacrev(lambda y, run=run: run(y)[1]))(y)
        for run in (
            transform.inverse_and_ladj,
            lambda y: substituted(transform, y, range(4)),
        )
    ]
    torch.testing.assert_close(*hessians)
    assert hessians[0].abs().max() > 1e-3


def test_helpers_choose_the_transformer():
    transform = spline_autoregressive(2, num_bins=4)
    assert isinstance(transform, Autoregressive)
    assert isinstance(transform.transformer, RationalQuadratic)
    assert transform.transformer.num_params == 11
