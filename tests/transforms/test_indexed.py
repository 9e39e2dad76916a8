"""Indexed transforms: F(z; u) = f(exp(s(u)) ⊙ z + t(u)) around several f, as a batch over u, and in Pyro."""

import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformedDistribution
from torch import nn

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    ComposeFlow,
    FlowTransform,
    IndexedTransform,
    affine_autoregressive,
    affine_coupling,
    conditional_affine_coupling,
    conditional_planar,
    planar,
    spline_autoregressive,
    sylvester,
)

INNER = {
    "planar": lambda: planar(3),
    "coupling": lambda: affine_coupling(3, (4,)),
    "autoregressive": lambda: affine_autoregressive(3, (4,)),
    "spline": lambda: spline_autoregressive(3, (4,), num_bins=3),
    "inverse": lambda: sylvester(3).inv,
    "chain": lambda: ComposeFlow([planar(3), affine_coupling(3, (4,))]),
}
inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@inner
def test_starts_as_the_transform_inside(make):
    f = perturb(make())
    x, u = torch.randn(5, 3), torch.randn(5, 2)
    F = IndexedTransform(f, 2).condition(u)
    torch.testing.assert_close(F.forward_and_ladj(x), f.forward_and_ladj(x))


@inner
def test_log_det_is_that_of_the_jacobian(make):
    transform = perturb(IndexedTransform(make(), 2).double())
    F, x = transform.condition(randn(2)), randn(3)
    J = torch.autograd.functional.jacobian(lambda x: F.forward_and_ladj(x)[0], x)
    torch.testing.assert_close(F.forward_and_ladj(x)[1], torch.linalg.slogdet(J)[1])


@inner
def test_is_the_formula_of_the_paper(make):
    f = make().double()
    transform = perturb(IndexedTransform(f, 2).double())
    u, z = randn(5, 2), randn(5, 3)
    t, s = transform.net(u).chunk(2, -1)
    s = math.log(1000) * (s / math.log(1000)).tanh()
    y, ladj = f.forward_and_ladj(s.exp() * z + t)
    torch.testing.assert_close(transform.condition(u).forward_and_ladj(z), (y, ladj + s.sum(-1)))


@inner
def test_inverse_and_batches_of_u(make):
    transform = perturb(IndexedTransform(make(), 2).double())
    u, x = randn(4, 2), randn(5, 1, 3)
    F = transform.condition(u)
    assert F.batch_shape == (4,)
    y, ladj = F.forward_and_ladj(x)
    assert y.shape == (5, 4, 3)
    back, inverse_ladj = F.inverse_and_ladj(y)
    torch.testing.assert_close(back, x.expand(5, 4, 3))
    torch.testing.assert_close(inverse_ladj, -ladj)
    for i, row in enumerate(u):
        alone = transform.condition(row).forward_and_ladj(x[:, 0])
        torch.testing.assert_close(alone, (y[:, i], ladj[:, i]))


@inner
def test_gradients_reach_both_networks(make):
    transform, u = perturb(IndexedTransform(make(), 2)), torch.randn(5, 2, requires_grad=True)
    x, ladj = transform.condition(u).inverse_and_ladj(torch.randn(5, 3))
    names = [name for name, _ in transform.named_parameters()]
    assert any(name.startswith("net.") for name in names)
    assert any(name.startswith("transform.") for name in names)
    grads = torch.autograd.grad((x**2).sum() + ladj.sum(), [u, *transform.parameters()])
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


def test_scales_stay_bounded_for_any_index():
    transform = perturb(IndexedTransform(planar(3), 1), scale=5.0)
    F, x = transform.condition(torch.tensor([[1e4], [-1e4]])), torch.randn(2, 3)
    y, ladj = F.forward_and_ladj(x)
    assert y.isfinite().all()
    s = F[0].forward_and_ladj(x)[1]
    assert (s.abs() <= 3 * math.log(1000) + 1e-4).all()
    assert ladj.isfinite().all()


def test_in_a_conditional_distribution_of_pyro():
    transform = perturb(IndexedTransform(affine_coupling(2, (4,)), 1).double())
    base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    density = ConditionalTransformedDistribution(base, [transform]).condition(randn(6, 1))
    assert density.batch_shape == (6,)
    y = density.rsample((4,))
    assert y.shape == (4, 6, 2)
    torch.testing.assert_close(density.log_prob(y.clone()), density.log_prob(y))
    whole = ConditionalTransformedDistribution(base, [transform.inv]).condition(randn(6, 1))
    assert whole.log_prob(whole.sample()).shape == (6,)


@torch.no_grad()
def test_a_draw_is_scored_without_a_second_pass_until_the_shift_changes():
    F = perturb(IndexedTransform(planar(2))).condition(torch.randn(5, 1))
    x = torch.randn(5, 2)
    y = F(x)
    assert F.inv(y) is x
    shift, _ = F[0]._bound  # no parameter of the chain
    shift.add_(1.0)
    assert not torch.allclose(F.inv(y), x)


# --- contexts ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: planar(3),
        lambda: conditional_planar(3, 4),
        lambda: conditional_affine_coupling(3, 4),
        lambda: affine_coupling(3, context_dim=4),
        lambda: affine_coupling(3, context_dim=4).inv,
        lambda: ComposeFlow([planar(3), affine_coupling(3, context_dim=4)]),
    ],
    ids=["plain", "hyper", "contextual", "coupling", "inverse", "chain"],
)
def test_context_beside_the_index(make):
    transform = perturb(IndexedTransform(make(), 2, context_dim=4).double())
    u, context, x = randn(7, 1, 2), randn(5, 4), randn(3)
    F = transform.condition(u, context)
    assert F.batch_shape == (7, 5)
    y, ladj = F.forward_and_ladj(x)
    assert y.shape == (7, 5, 3)
    alone = transform.condition(u[2, 0], context[1]).forward_and_ladj(x)
    torch.testing.assert_close(alone, (y[2, 1], ladj[2, 1]))
    assert not torch.isclose(y[2, 1], y[2, 3]).any()
    torch.testing.assert_close(F.inverse_and_ladj(y)[0], x.expand(7, 5, 3))


def test_contexts_that_do_not_fit():
    with pytest.raises(
        ValueError,
        match="transform: expected one with the context_dim of IndexedTransform, 0, or 0, got 4",
    ):
        IndexedTransform(conditional_planar(3, 4))
    transform = IndexedTransform(planar(3), 2, context_dim=4)
    with pytest.raises(ValueError, match=r"call condition\(index, context\)"):
        transform.condition(torch.zeros(2))
    with pytest.raises(ValueError, match=r"context: expected a tensor of shape \(\*, 4\)"):
        transform.condition(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="context: expected None, since context_dim is 0"):
        IndexedTransform(planar(3)).condition(torch.zeros(1), torch.zeros(3))


# --- images ---


class ByPixel(FlowTransform):
    """y = 2 x on images of C channels."""

    domain = codomain = constraints.independent(constraints.real, 3)

    def forward_and_ladj(self, x):
        return 2 * x, torch.full_like(x, 2.0).log().sum((-3, -2, -1))

    def inverse_and_ladj(self, y):
        return y / 2, -torch.full_like(y, 2.0).log().sum((-3, -2, -1))


def test_images_are_scaled_by_channel():
    transform = perturb(IndexedTransform(ByPixel(), 2, input_dim=3).double())
    u, x = randn(4, 2), randn(4, 3, 2, 5)
    F = transform.condition(u)
    assert (F.batch_shape, F.domain.event_dim) == ((4,), 3)
    y, ladj = F.forward_and_ladj(x)
    for i in range(4):
        J = torch.autograd.functional.jacobian(
            lambda x, i=i: transform.condition(u[i]).forward_and_ladj(x)[0], x[i]
        ).reshape(30, 30)
        slopes = J.diagonal().reshape(3, 10)
        torch.testing.assert_close(slopes, slopes[:, :1].expand(3, 10))
        torch.testing.assert_close(ladj[i], torch.linalg.slogdet(J)[1])
    torch.testing.assert_close(F.inverse_and_ladj(y), (x, -ladj))
    with pytest.raises(ValueError, match=r"x: expected a tensor of shape \(\*, 3, H, W\)"):
        F(randn(4, 1, 2, 5))


# --- as a module ---


@pytest.mark.parametrize("input_dim", [3, (3, 2, 5)], ids=["channels", "event"])
def test_size_is_read_off_the_transform(input_dim):
    f = ByPixel()
    f.input_dim = input_dim
    assert IndexedTransform(ComposeFlow([f.inv]), 2).net[-1].out_features == 6


def test_options_and_copies():
    transform = perturb(IndexedTransform(planar(3), 2, (7, 6, 5), activation=nn.ReLU))
    widths = [part.out_features for part in transform.net if isinstance(part, nn.Linear)]
    assert widths == [7, 6, 5, 6]
    assert any(isinstance(part, nn.ReLU) for part in transform.net)
    u, x = torch.randn(5, 2), torch.randn(5, 3)
    y = transform.condition(u)(x)
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        torch.testing.assert_close(twin.condition(u)(x), y)
    assert repr(transform) == "IndexedTransform(Planar(3, num_layers=1), index_dim=2)"
    assert repr(IndexedTransform(planar(3), context_dim=4)).endswith("index_dim=1, context_dim=4)")


class Positive(FlowTransform):
    domain = constraints.independent(constraints.positive, 1)
    input_dim = 3

    def forward_and_ladj(self, x):
        return x.log(), -x.log().sum(-1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: IndexedTransform(nn.Linear(2, 2)), TypeError, "got a Linear"),
        (lambda: IndexedTransform(dist.transforms.Planar(2)), TypeError, "got a Planar"),
        (
            lambda: IndexedTransform(planar(2), 0),
            ValueError,
            "index_dim: expected a positive integer",
        ),
        (
            lambda: IndexedTransform(ByPixel()),
            ValueError,
            "ByPixel has none to read; give input_dim",
        ),
        (
            lambda: IndexedTransform(Positive()).condition(torch.zeros(1)),
            ValueError,
            "expected one of unconstrained values",
        ),
        (
            lambda: IndexedTransform(planar(2)).condition(torch.zeros(2)),
            ValueError,
            r"index: expected a tensor of shape \(\*, 1\)",
        ),
        (
            lambda: IndexedTransform(planar(2)).condition(torch.zeros(1))(torch.zeros(3)),
            ValueError,
            r"x: expected a tensor of shape \(\*, 2\)",
        ),
    ],
    ids=["no-transform", "pyro", "index_dim", "no-size", "domain", "index", "input"],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
