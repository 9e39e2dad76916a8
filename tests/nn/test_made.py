"""Masked autoregressive networks: what depends on what, at any order, width and depth."""

import pytest
import torch

from pyro_flows_ext.nn import MADE
from pyro_flows_ext.nn.made import MaskedLinear
from pyro_flows_ext.testing import perturb


def network(*args, **kwargs):
    return perturb(MADE(*args, **kwargs).double(), scale=2.0)


def dependence(net, input_dim, context=None):
    """dθ_i/dx_j, the largest over parameters and a few points: `(D, D)`."""
    points = torch.randn(20, input_dim, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: net(x, context)))(points)
    return jacobian.abs().amax((0, 1))


ORDERS = {
    "default": None,
    "reverse": [4, 3, 2, 1, 0],
    "mixed": [2, 0, 4, 1, 3],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(
    "hidden_dims", [None, (), (7,), (16, 16), (16, 9, 9, 12)], ids=["default", *"0124"]
)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("context_dim", [0, 2], ids=["plain", "context"])
def test_parameters_depend_on_exactly_the_variables_before(
    order, hidden_dims, residual, context_dim
):
    net = network(5, 3, hidden_dims, order=order, context_dim=context_dim, residual=residual)
    context = torch.randn(2, dtype=torch.float64) if context_dim else None
    rank = {variable: k for k, variable in enumerate(order or range(5))}
    before = torch.tensor([[rank[j] < rank[i] for j in range(5)] for i in range(5)])
    found = dependence(net, 5, context)
    assert torch.equal(found[~before], torch.zeros_like(found[~before]))
    assert (found[before] > 0).all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_narrow_layers_lose_dependences_and_gain_none(width):
    found = dependence(network(6, 2, (width,)), 6)
    assert torch.equal(found.triu(), torch.zeros(6, 6, dtype=torch.float64))
    assert found.any()


@pytest.mark.parametrize("context_dim", [0, 2], ids=["plain", "context"])
@pytest.mark.parametrize("hidden_dims", [(), (4, 4)], ids=str)
def test_one_variable_depends_on_the_context_alone(context_dim, hidden_dims):
    net = network(1, 3, hidden_dims, context_dim=context_dim)
    context = torch.randn(5, 2, dtype=torch.float64) if context_dim else None
    x = torch.randn(5, 1, dtype=torch.float64)
    theta = net(x, context)
    assert theta.shape == (5, 3, 1)
    assert torch.equal(net(x + 1, context), theta)
    assert torch.equal(theta[0], theta[1]) == (context is None)


def test_all_parameters_depend_on_the_context():
    """Those of the first variable too, and not linearly: it has hidden units of its own."""
    net = network(4, 2, (8, 8), context_dim=3)
    x = torch.randn(4, dtype=torch.float64)
    context = torch.randn(3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda c: net(x, c))
    assert (jacobian(context).abs() > 0).all()
    assert ((jacobian(context) - jacobian(-context)).abs() > 0).all()


@pytest.mark.parametrize("hidden_dims", [None, (), (5, 5)], ids=str)
def test_starts_at_zero(hidden_dims):
    net = MADE(3, 4, hidden_dims, context_dim=2)
    theta = net(torch.randn(6, 3), torch.randn(6, 2))
    assert theta.shape == (6, 4, 3)
    assert torch.equal(theta, torch.zeros(6, 4, 3))


def test_parameters_of_a_variable_are_its_own_rows():
    """The last bias holds the first parameter of all variables, then the second."""
    net = MADE(3, 2, (4,)).double()
    with torch.no_grad():
        net.layers[-1].bias.copy_(torch.arange(6.0))
    expected = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    assert torch.equal(net(torch.randn(3, dtype=torch.float64)), expected)


@pytest.mark.parametrize(
    ("x_batch", "context_batch"),
    [((), ()), ((4,), ()), ((), (4,)), ((3, 4), (4,)), ((3, 1), (4,))],
    ids=str,
)
def test_context_broadcasts(x_batch, context_batch):
    net = network(3, 2, (6,), context_dim=2)
    x = torch.randn(*x_batch, 3, dtype=torch.float64)
    context = torch.randn(*context_batch, 2, dtype=torch.float64)
    batch = torch.broadcast_shapes(x_batch, context_batch)
    theta = net(x, context)
    assert theta.shape == (*batch, 2, 3)
    torch.testing.assert_close(theta, net(x.expand(*batch, 3), context.expand(*batch, 2)))


def test_bound_network_masks_its_weights_once(monkeypatch):
    net = network(3, 2, (6, 6))
    run, x = net.bind(), torch.randn(4, 3, dtype=torch.float64)
    expected = net(x)
    monkeypatch.setattr(MaskedLinear, "masked_weight", None)
    assert torch.equal(run(x), expected)


def test_masked_weights_get_no_gradient():
    net = network(4, 2, (8, 8))
    net(torch.randn(10, 4, dtype=torch.float64)).square().sum().backward()
    for layer in net.layers:
        assert torch.equal(layer.weight.grad != 0, layer.mask.bool())


def test_state_dict_carries_the_order():
    x = torch.randn(5, 4, dtype=torch.float64)
    net, other = network(4, 2, (8,), order=[2, 0, 3, 1]), network(4, 2, (8,))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert other.order.tolist() == [2, 0, 3, 1]


def test_residual_layers_add_up():
    net = network(4, 1, (8, 8), residual=True)
    plain = MADE(4, 1, (8, 8), residual=False).double()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        for n in (net, plain):
            n.layers[1].weight.zero_()
            n.layers[1].bias.zero_()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(plain(x), plain(0 * x))  # the second hidden layer forgets all
    assert not torch.equal(net(x), net(0 * x))


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3], [0, 0, 1], [1, 2, 3], [0, 1, 2, 3]], ids=str)
def test_order_must_be_a_permutation(order):
    with pytest.raises(ValueError, match=r"order: expected a permutation of 0, ..., 2, got"):
        MADE(3, 2, order=order)


def test_context_must_fit():
    x = torch.randn(5, 3)
    with pytest.raises(
        ValueError, match=r"context: expected a tensor of shape \(\*, 2\), got none"
    ):
        MADE(3, 1, context_dim=2)(x)
    with pytest.raises(ValueError, match=r"context: .* got \(5, 3\)"):
        MADE(3, 1, context_dim=2)(x, x)
    with pytest.raises(ValueError, match="context: expected none, got one"):
        MADE(3, 1)(x, x)
