"""Lipschitz networks: the bound holds for any parameters, everywhere, and is reached."""

import pytest
import torch
import torch.nn.functional as F

from pyro_flows_ext.nn import LipschitzConvNet, LipschitzMLP, LipSwish
from pyro_flows_ext.ops import conv_norm_bound
from pyro_flows_ext.testing import perturb

SCALES = [0.0, 0.7, 5.0, 100.0]
# Rounding of norms near the bound.
SLACK = 1 + 1e-12


def jacobian_norms(net, x, *context):
    """‖∂g/∂x‖₂ at each of the points `(N, event)`."""

    def flat(x):
        return net(x.reshape(event), *context).flatten()

    event = x.shape[1:]
    J = torch.func.vmap(torch.func.jacrev(flat))(x.flatten(1))
    return torch.linalg.matrix_norm(J, 2)


def points(*event):
    """Near the origin, where activations bend, and far out, where they are linear."""
    return torch.cat([s * torch.randn(100, *event, dtype=torch.float64) for s in (0.3, 3.0, 100.0)])


def mlp(*args, scale=0.7, **kwargs):
    net = LipschitzMLP(*args, **kwargs).double()
    return perturb(net, scale=scale) if scale else net


def convnet(*args, scale=0.7, **kwargs):
    net = LipschitzConvNet(*args, **kwargs).double()
    return perturb(net, scale=scale) if scale else net


# --- the activation ---


@pytest.mark.parametrize("raw_beta", [-20.0, -1.0, 0.5, 3.0, 100.0])
def test_lipswish(raw_beta):
    activation = LipSwish().double()
    with torch.no_grad():
        activation.raw_beta.fill_(raw_beta)
    beta = F.softplus(activation.raw_beta.detach())
    x = torch.cat([torch.linspace(-50, 50, 100_001).double() / beta, torch.randn(100).double()])
    value, slope = activation.value_and_slope(x)
    torch.testing.assert_close(value, activation(x))
    torch.testing.assert_close(value, x * torch.sigmoid(beta * x) / 1.1)
    torch.testing.assert_close(slope, torch.func.vmap(torch.func.grad(activation))(x))
    assert 0.999 < slope.max() <= 1
    assert slope.min() > -0.1


def test_lipswish_beta_learns():
    activation = LipSwish()
    activation(torch.ones(3)).sum().backward()
    assert activation.raw_beta.grad.abs() > 0


# --- the bound ---


@pytest.mark.parametrize("lipschitz", [0.1, 0.97])
@pytest.mark.parametrize("hidden_dims", [(), (1,), (9,), (8, 8), (3, 20, 5)], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_mlp_is_a_contraction(lipschitz, hidden_dims, scale):
    net = mlp(3, hidden_dims, lipschitz=lipschitz, scale=scale)
    assert jacobian_norms(net, points(3)).max() <= lipschitz * SLACK


@pytest.mark.parametrize("lipschitz", [0.1, 0.97])
@pytest.mark.parametrize("hidden_channels", [(), (4,), (3, 5)], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_convnet_is_a_contraction(lipschitz, hidden_channels, scale):
    net = convnet(2, hidden_channels, (3, 4), lipschitz=lipschitz, scale=scale)
    assert jacobian_norms(net, points(2, 3, 4)).max() <= lipschitz * SLACK


@pytest.mark.parametrize("scale", SCALES)
def test_mlp_is_a_contraction_in_x_for_every_context(scale):
    net = mlp(3, (8, 8), context_dim=2, scale=scale)
    for size in (1.0, 1000.0):
        context = size * torch.randn(2, dtype=torch.float64)
        assert jacobian_norms(net, points(3), context).max() <= 0.97 * SLACK


@pytest.mark.parametrize("make", [mlp, convnet], ids=["mlp", "convnet"])
def test_the_bound_of_a_trained_direction_is_reached(make):
    """Linear chains of one direction: the norm of each layer counts in full."""
    net = make(3, ()) if make is mlp else make(1, (), (9, 9), kernel_sizes=[1])
    with torch.no_grad():
        net.layers[0].weight.mul_(1e6)
    event = (3,) if make is mlp else (1, 9, 9)
    norm = jacobian_norms(net, torch.zeros(1, *event, dtype=torch.float64))
    torch.testing.assert_close(norm.item(), 0.97, rtol=1e-9, atol=0)


def test_aligned_layers_come_close_to_the_bound():
    net = mlp(2, (2,))
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.copy_(5 * torch.eye(2))
    assert jacobian_norms(net, points(2)).max() > 0.96


def test_each_layer_has_its_share():
    net = mlp(3, (6, 5), lipschitz=0.9, scale=5.0)
    bound = net.bind()
    for linear, layer in zip(bound.layers, net.layers, strict=True):
        weight = linear(torch.eye(layer.in_features, dtype=torch.float64)).T
        norm = torch.linalg.matrix_norm(weight, 2).item()
        assert norm == pytest.approx(0.9 ** (1 / 3), rel=1e-12)


def test_each_convolution_stays_below_its_share():
    net = convnet(2, (3, 3), (3, 4), lipschitz=0.9, scale=5.0)
    for linear, layer in zip(net.bind().layers, net.layers, strict=True):
        inputs = torch.eye(layer.in_channels * 12, dtype=torch.float64)
        matrix = linear(inputs.reshape(-1, layer.in_channels, 3, 4)).flatten(1).T
        norm = torch.linalg.matrix_norm(matrix, 2)
        assert 0.3 < norm <= 0.9 ** (1 / 3) * SLACK


def test_weights_within_the_bound_are_used_as_they_are():
    net = mlp(3, (4,))
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(0.5 / torch.linalg.matrix_norm(layer.weight, 2))
    x = torch.randn(5, 3, dtype=torch.float64)
    first, last = net.layers
    torch.testing.assert_close(net(x), last(net.activations[0](first(x))))


def test_nothing_goes_stale():
    """Norms are those of the present weights, in eval mode, after a write to `.data`, and after loading."""
    net = mlp(3, (8, 8)).eval()
    net(points(3))
    for layer in net.layers:
        layer.weight.data.mul_(100)
    assert jacobian_norms(net, points(3)).max() <= 0.97 * SLACK
    other = mlp(3, (8, 8), scale=0)
    other.load_state_dict(net.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(other(x), net(x))
    assert list(net.buffers()) == []


# --- derivatives ---


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 2], ids=["plain", "context"])
def test_mlp_linearize(batch, context_dim):
    net = mlp(3, (8, 8), context_dim=context_dim)
    x = torch.randn(*batch, 3, dtype=torch.float64)
    context = torch.randn(*batch, 2, dtype=torch.float64) if context_dim else None
    value, product = net.bind(context).linearize(x)
    torch.testing.assert_close(value, net(x, context))
    V = torch.randn(5, *batch, 3, dtype=torch.float64)
    for v, actual in zip(V, product(V), strict=True):
        expected = torch.autograd.functional.jvp(lambda x: net(x, context), x, v)[1]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 2], ids=["plain", "context"])
def test_convnet_linearize(batch, context_dim):
    net = convnet(2, (4, 4), (3, 3), context_dim=context_dim)
    x = torch.randn(*batch, 2, 3, 3, dtype=torch.float64)
    context = torch.randn(*batch, 2, dtype=torch.float64) if context_dim else None
    value, product = net.bind(context).linearize(x)
    assert value.shape == x.shape
    torch.testing.assert_close(value, net(x, context))
    V = torch.randn(5, *batch, 2, 3, 3, dtype=torch.float64)
    for v, actual in zip(V, product(V), strict=True):
        expected = torch.autograd.functional.jvp(lambda x: net(x, context), x, v)[1]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("what", ["zero", "tied"])
@pytest.mark.parametrize("make", [mlp, convnet], ids=["mlp", "convnet"])
def test_gradients_stay_finite(make, what):
    """At W = 0 and at tied singular values, where singular vectors are anybody's choice."""
    net = make(2, (4, 4), scale=0) if make is mlp else make(2, (4, 4), (3, 3), scale=0)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.zero_()
            if what == "tied":
                middle = layer.weight.shape[-1] // 2
                part = layer.weight if make is mlp else layer.weight[:, :, middle, middle]
                part.copy_(3 * torch.eye(*part.shape))
    x = torch.randn(5, *((2,) if make is mlp else (2, 3, 3)), dtype=torch.float64)
    grads = torch.autograd.grad(net(x).square().sum() + net(x).sum(), list(net.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["within", "at the bound"])
def test_gradcheck(scale):
    net = mlp(2, (4,), scale=scale)
    names, values = zip(*net.named_parameters(), strict=True)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(
            net, dict(zip(names, values, strict=True)), x
        ),
        (x, *values),
    )


@pytest.mark.parametrize("make", [mlp, convnet], ids=["mlp", "convnet"])
def test_starts_at_zero_with_a_gradient(make):
    for hidden in ((), (5, 5)):
        args = (2, hidden) if make is mlp else (2, hidden, (3, 3))
        net = make(*args, context_dim=2, scale=0)
        x = torch.randn(5, *((2,) if make is mlp else (2, 3, 3)), dtype=torch.float64)
        value = net(x, torch.randn(2, dtype=torch.float64))
        assert torch.equal(value, torch.zeros_like(x))
        value.square().sum().backward()
        (net(x, torch.randn(2, dtype=torch.float64)) * x).sum().backward()
        assert net.layers[-1].weight.grad.abs().max() > 0


# --- use ---


@pytest.mark.parametrize(
    ("x_batch", "context_batch"), [((), ()), ((4,), ()), ((), (4,)), ((3, 1), (4,))], ids=str
)
def test_context_broadcasts(x_batch, context_batch):
    batch = torch.broadcast_shapes(x_batch, context_batch)
    for net, event in (
        (mlp(3, (6,), context_dim=2), (3,)),
        (convnet(1, (4,), (2, 2), context_dim=2), (1, 2, 2)),
    ):
        x = torch.randn(*x_batch, *event, dtype=torch.float64)
        context = torch.randn(*context_batch, 2, dtype=torch.float64)
        value = net(x, context)
        assert value.shape == (*batch, *event)
        expected = net(x.expand(*batch, *event), context.expand(*batch, 2))
        torch.testing.assert_close(value, expected)
        assert (value - net(x, context + 1)).abs().min() > 0


def test_kernel_sizes():
    net = LipschitzConvNet(2, (4, 5, 6), (4, 4))
    assert [layer.kernel_size[0] for layer in net.layers] == [3, 1, 1, 3]
    net = LipschitzConvNet(2, (4,), (4, 4), kernel_sizes=[5, 1])
    assert [layer.kernel_size[0] for layer in net.layers] == [5, 1]
    assert net(torch.randn(2, 4, 4)).shape == (2, 4, 4)
    for sizes in ([3], [3, 2], [3, 3, 3]):
        with pytest.raises(ValueError, match="kernel_sizes: expected 2 odd numbers"):
            LipschitzConvNet(2, (4,), (4, 4), kernel_sizes=sizes)


def test_convolutions_use_the_bound_of_their_image_size():
    net = convnet(1, (), (2, 2), scale=100.0)
    weight = net.layers[0].weight
    bound = conv_norm_bound(weight, (2, 2))
    x = torch.randn(1, 2, 2, dtype=torch.float64)
    expected = F.conv2d(x[None], weight * 0.97 / bound, net.layers[0].bias, padding=1)[0]
    torch.testing.assert_close(net(x), expected)


class Tanh(torch.nn.Tanh):
    def value_and_slope(self, x):
        h = x.tanh()
        return h, 1 - h**2


def test_activation():
    net = mlp(2, (4,), activation=Tanh)
    assert jacobian_norms(net, points(2)).max() <= 0.97 * SLACK
    x = torch.randn(3, 2, dtype=torch.float64)
    J = torch.func.vmap(torch.func.jacrev(net))(x)
    product = net.bind().linearize(x)[1]
    v = torch.randn(1, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(product(v)[0], (J @ v[0].unsqueeze(-1)).squeeze(-1))


@pytest.mark.slow
@pytest.mark.parametrize("make", [mlp, convnet], ids=["mlp", "convnet"])
def test_compiles(make):
    net = make(2, (4, 4)) if make is mlp else make(2, (4, 4), (3, 3))
    x = torch.randn(5, *((2,) if make is mlp else (2, 3, 3)), dtype=torch.float64)
    compiled = torch.compile(lambda x: net(x), fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad((run(x) * x).sum(), list(net.parameters())) for run in (compiled, net)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("lipschitz", [0, 1, -0.5, 2.0])
def test_lipschitz_must_be_a_contraction(lipschitz):
    with pytest.raises(ValueError, match=r"lipschitz: expected a number between 0 and 1"):
        LipschitzMLP(2, lipschitz=lipschitz)


def test_context_must_fit():
    x = torch.randn(5, 3)
    with pytest.raises(
        ValueError, match=r"context: expected a tensor of shape \(\*, 2\), got none"
    ):
        LipschitzMLP(3, context_dim=2)(x)
    with pytest.raises(ValueError, match=r"context: .* got \(5, 3\)"):
        LipschitzMLP(3, context_dim=2)(x, x)
    with pytest.raises(ValueError, match="context: expected none, got one"):
        LipschitzMLP(3)(x, x)


def test_default_widths():
    assert [layer.out_features for layer in LipschitzMLP(3).layers] == [64, 64, 3]
    assert [layer.out_features for layer in LipschitzMLP(40).layers] == [80, 80, 40]
    assert [layer.out_channels for layer in LipschitzConvNet(3).layers] == [64, 64, 3]
