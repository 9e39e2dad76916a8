"""Convolutional conditioners and residual perceptrons: shapes, contexts, formulas, and where they start."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_flows_ext.nn import GatedConvNet, ResidualConvNet, ResidualMLP
from pyro_flows_ext.nn.convnet import join_channels
from pyro_flows_ext.testing import perturb

NETS = [ResidualConvNet, GatedConvNet]
nets = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)


def make(net, *args, **options):
    return perturb(net(*args, **{"hidden_channels": 4, **options}).double())


@nets
@pytest.mark.parametrize("context_dim", [0, 2])
def test_starts_at_zero_and_with_it_only_there(net, context_dim):
    x = torch.randn(3, 2 + context_dim, 4, 5)
    assert not net(2, 6, context_dim=context_dim)(x).any()
    assert net(2, 6, context_dim=context_dim, zero_last=False)(x).all()


@nets
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_any_batch_shape_is_a_loop_over_images(net, batch):
    network, x = make(net, 2, 3), torch.randn(*batch, 2, 4, 5).double()
    y = network(x)
    assert y.shape == (*batch, 3, 4, 5)
    rows = [network(row.unsqueeze(0)).squeeze(0) for row in x.reshape(-1, 2, 4, 5)]
    torch.testing.assert_close(y, torch.stack(rows).reshape(y.shape))


@nets
def test_empty_batch(net):
    assert net(2, 3)(torch.zeros(0, 2, 4, 5)).shape == (0, 3, 4, 5)


@nets
@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_sees_num_blocks_plus_2_pixels_away(net, num_blocks):
    network = make(net, 1, 1, num_blocks=num_blocks, activation=nn.Tanh)
    x = torch.randn(1, 1, 13).double().requires_grad_()
    (grad,) = torch.autograd.grad(network(x)[0, 0, 6], x)
    distance = (torch.arange(13) - 6).abs()
    assert torch.equal(grad[0, 0] != 0, distance <= num_blocks + 2)


def test_formula_of_the_blocks():
    x = torch.randn(2, 3, 4, 4).double()
    for net in NETS:
        network = make(net, 3, 5, num_blocks=2, activation=nn.SiLU)
        first, *blocks, _, last = network.net
        h = first(x)
        for block in blocks:
            _, wide, _, narrow = block.net
            change = narrow(F.silu(wide(F.silu(h))))
            if net is GatedConvNet:
                a, b = change[:, :4], change[:, 4:]
                change = a / (1 + torch.exp(-b))
            h = h + change
        torch.testing.assert_close(network(x), last(F.silu(h)))


@nets
@pytest.mark.parametrize(
    ("x_batch", "context_batch"),
    [((), ()), ((3,), ()), ((), (3,)), ((3,), (3,)), ((3,), (4, 1)), ((4, 1), (3,))],
    ids=str,
)
def test_contexts_are_constant_channels_and_broadcast(net, x_batch, context_batch):
    network = make(net, 2, 3, context_dim=2)
    x, context = torch.randn(*x_batch, 2, 4, 5).double(), torch.randn(*context_batch, 2).double()
    batch = torch.broadcast_shapes(x_batch, context_batch)
    y = network(x, context)
    assert y.shape == (*batch, 3, 4, 5)
    constant = context.reshape(*context_batch, 2, 1, 1) * torch.ones(4, 5)
    joined = torch.cat([x.expand(*batch, 2, 4, 5), constant.expand(*batch, 2, 4, 5)], -3)
    assert torch.equal(join_channels(x, context), joined)
    torch.testing.assert_close(y, network(joined))


@nets
def test_function_transforms(net):
    network, x = make(net, 2, 3), torch.randn(5, 2, 3, 3).double()
    torch.testing.assert_close(torch.vmap(network)(x), network(x))


@nets
@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4, 4), (4, 4)], ids=str)
def test_refuses_other_channels(net, shape):
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 2, H, W\), .* got"):
        net(2, 3)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 7, H, W\), .* got"):
        net(2, 3, context_dim=5)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4))


# --- residual perceptrons ---


def test_residual_mlp_adds_equal_hidden_layers():
    network = perturb(ResidualMLP(4, 3, (5, 5, 4, 4), nn.SiLU).double())
    first, second, third, fourth, last = (
        layer for layer in network if isinstance(layer, nn.Linear)
    )
    x = torch.randn(7, 4).double()
    h = F.silu(first(x))
    h = h + F.silu(second(h))
    h = F.silu(third(h))
    h = h + F.silu(fourth(h))
    torch.testing.assert_close(network(x), last(h))


def test_residual_mlp_adds_no_input():
    network = perturb(ResidualMLP(4, 3, (4,)))
    x = torch.randn(7, 4)
    torch.testing.assert_close(network(x), nn.Sequential.forward(network, x))


@pytest.mark.parametrize("hidden_dims", [(), (5,), (5, 5)], ids=str)
def test_residual_mlp_starts_at_zero_and_takes_a_context(hidden_dims):
    network = ResidualMLP(3, 4, hidden_dims, context_dim=2, zero_last=True)
    x, context = torch.randn(6, 3), torch.randn(5, 1, 2)
    assert not network(x, context).any()
    y = perturb(network)(x, context)
    assert y.shape == (5, 6, 4)
    torch.testing.assert_close(y[2, 3], network(torch.cat([x[3], context[2, 0]])))


@pytest.mark.slow
def test_residual_mlp_compiles():
    network, x = ResidualMLP(3, 4, (5, 5)), torch.randn(6, 3)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
