"""Coupling layers on images: masks, splits, networks, and that the mathematics is that of vectors."""

import copy
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_flows_ext.nn import GatedConvNet, ResidualConvNet
from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    Additive,
    ComposeFlow,
    Coupling,
    Squeeze,
    affine_coupling,
    conditional_affine_coupling,
    spline_coupling,
)

HIDDEN = (3,)
FAMILIES = {
    "additive": partial(Coupling, transformer=Additive()),
    "affine": affine_coupling,
    "spline": spline_coupling,
}
SHAPE = (3, 2, 3)
BOARD = torch.tensor([[True, False, True], [False, True, False]]).expand(SHAPE)
MIXED = torch.arange(18).reshape(SHAPE) % 5 < 2
CHANNELS = torch.tensor([True, False, False])[:, None, None].expand(SHAPE)
MASKS = {
    "channel": ("channel", CHANNELS),
    "half": ("half", CHANNELS),
    "alternating": (
        "alternating",
        torch.tensor([True, False, True])[:, None, None].expand(SHAPE),
    ),
    "checkerboard": ("checkerboard", BOARD),
    "custom": (MIXED, MIXED),
    "custom-channels": (~CHANNELS, ~CHANNELS),
    "list": (MIXED.tolist(), MIXED),
}

families = pytest.mark.parametrize("family", FAMILIES)
masks = pytest.mark.parametrize("mask", MASKS)
flips = pytest.mark.parametrize("flip", [False, True], ids=["", "flipped"])


def make(family, shape=SHAPE, **options):
    return perturb(FAMILIES[family](shape, HIDDEN, **options).double())


@families
@masks
@flips
def test_mask_says_what_passes_and_what_depends_on_what(family, mask, flip):
    given, expected = MASKS[mask]
    passes = expected ^ flip
    transform = make(family, mask=given, flip=flip, activation=nn.Tanh)
    assert torch.equal(transform.mask, passes)
    x = 0.5 * torch.randn(SHAPE, dtype=torch.float64)
    y, _ = transform.forward_and_ladj(x)
    assert torch.equal(y[passes], x[passes])
    assert (y[~passes] != x[~passes]).all()
    jacobian = torch.autograd.functional.jacobian(lambda x: transform.forward_and_ladj(x)[0], x)
    flat = passes.flatten()  # the network sees all of so small an image
    depends = torch.eye(18, dtype=torch.bool) | (~flat.unsqueeze(1) & flat)
    assert torch.equal(jacobian.reshape(18, 18) != 0, depends)


@families
@masks
@flips
def test_starts_at_the_identity(family, mask, flip):
    transform = FAMILIES[family](SHAPE, mask=MASKS[mask][0], flip=flip)
    x = 3 * torch.randn(20, *SHAPE)
    for run in (transform.forward_and_ladj, transform.inverse_and_ladj):
        y, ladj = run(x)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(ladj, torch.zeros(20), rtol=0, atol=1e-5)


def test_default_mask_goes_by_channel():
    assert torch.equal(affine_coupling((5, 2, 2)).mask[:, 0, 0], torch.arange(5) < 2)


class OfVectors(nn.Module):
    """The network of a vector coupling layer, for the same elements as an image."""

    def __init__(self, net, shape, mask, num_params):
        super().__init__()
        self.net, self.shape, self.mask, self.num_params = net, shape, mask, num_params

    def forward(self, seen):
        C, H, W = self.shape
        by_channel = seen.shape[-3] < C
        passed = seen.flatten(-3) if by_channel else seen.flatten(-3)[..., self.mask.flatten()]
        theta = self.net(passed).unflatten(-1, (self.num_params, -1))
        if not by_channel:
            full = theta.new_full((*theta.shape[:-1], C * H * W), 7.0)  # shall not be used
            full[..., ~self.mask.flatten()] = theta
            theta = full
        return theta.flatten(-2).unflatten(-1, (-1, H, W))


@families
@masks
@flips
def test_is_the_vector_layer_on_the_elements_of_the_image(family, mask, flip):
    given, expected = MASKS[mask]
    passes = expected ^ flip
    vector = perturb(FAMILIES[family](18, (6,), mask=passes.flatten()).double())
    net = OfVectors(vector.net, SHAPE, passes, vector.transformer.num_params)
    image = FAMILIES[family](SHAPE, mask=given, flip=flip, net=net).double()
    x = torch.randn(4, 2, *SHAPE, dtype=torch.float64)
    for method in ("forward_and_ladj", "inverse_and_ladj"):
        y, ladj = getattr(image, method)(x)
        expected_y, expected_ladj = getattr(vector, method)(x.flatten(-3))
        torch.testing.assert_close(y, expected_y.reshape(x.shape))
        torch.testing.assert_close(ladj, expected_ladj)


@pytest.mark.parametrize("mask", ["channel", "checkerboard"])
def test_parameters_are_laid_out_number_by_number(mask):
    """The first C_out channels of the network are shifts, the next C_out raw scales."""
    transform = make("affine", mask=mask)
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    passes = transform.mask
    theta = transform.net(x[:, :1] if mask == "channel" else torch.where(passes, x, 0.0))
    t, s = theta.chunk(2, 1)
    if mask == "channel":
        t, s = (torch.cat([torch.zeros_like(x[:, :1]), part], 1) for part in (t, s))
    s = torch.log(torch.tensor(1e3).double()) * (s / torch.log(torch.tensor(1e3).double())).tanh()
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, torch.where(passes, x, x * s.exp() + t))
    torch.testing.assert_close(ladj, torch.where(passes, 0.0, s).sum((1, 2, 3)))


@families
@pytest.mark.parametrize("far", [1e30, float("inf")])
def test_what_passes_may_be_anything(family, far):
    """Elements that pass are no input of the formulas, so that no size of theirs spoils a gradient."""
    num_params = 11 if family == "spline" else 1 if family == "additive" else 2

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.randn(num_params * 3, 1, 1))

        def forward(self, seen):
            return self.theta.expand(*seen.shape[:-3], -1, *SHAPE[1:])

    options = {"num_bins": 4} if family == "spline" else {}
    transform = FAMILIES[family](SHAPE, mask="checkerboard", net=Constant(), **options)
    x = torch.randn(4, *SHAPE).masked_fill(BOARD, far).requires_grad_()
    for run in (transform.forward_and_ladj, transform.inverse_and_ladj):
        y, ladj = run(x)
        assert ladj.isfinite().all()
        loss = y[:, ~BOARD].sum() + ladj.sum()
        grads = torch.autograd.grad(loss, [x, *transform.parameters()])
        assert all(grad.isfinite().all() for grad in grads)


@families
@pytest.mark.parametrize("mask", ["channel", "checkerboard"])
@pytest.mark.parametrize(
    ("context_batch", "x_batch"), [((), (3,)), ((3,), ()), ((3,), (3,)), ((4, 1), (3,))], ids=str
)
def test_contexts_broadcast(family, mask, context_batch, x_batch):
    transform = perturb(FAMILIES[family](SHAPE, HIDDEN, mask=mask, context_dim=2).double())
    context, x = torch.randn(*context_batch, 2).double(), torch.randn(*x_batch, *SHAPE).double()
    batch = torch.broadcast_shapes(context_batch, x_batch)
    full = transform.condition(context.expand(*batch, 2))
    assert transform.condition(context).batch_shape == context_batch
    for method in ("forward_and_ladj", "inverse_and_ladj"):
        y, ladj = getattr(transform.condition(context), method)(x)
        assert y.shape == (*batch, *SHAPE)
        assert ladj.shape == batch
        torch.testing.assert_close((y, ladj), getattr(full, method)(x.expand(*batch, *SHAPE)))
        other = getattr(transform.condition(context + 1), method)(x)
        assert not torch.allclose(other[0], y)


@families
@pytest.mark.parametrize("net", [ResidualConvNet, GatedConvNet], ids=lambda net: net.__name__)
def test_a_net_of_ones_own(family, net):
    plain = make(family)
    num_params = plain.transformer.num_params
    own = FAMILIES[family](SHAPE, net=net(1, 2 * num_params, 4, 1))
    x = torch.randn(6, *SHAPE)
    torch.testing.assert_close(own.forward_and_ladj(x)[0], x)  # both start at zero
    perturb(own)
    y, ladj = own.forward_and_ladj(x)
    back, ladj_back = own.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ladj_back, -ladj, rtol=1e-4, atol=1e-4)


def test_a_conditional_net_of_ones_own_sees_the_context_in_its_last_channels():
    seen = []

    class Net(nn.Module):
        def forward(self, joined):
            seen.append(joined)
            return joined.new_zeros(*joined.shape[:-3], 4, *joined.shape[-2:])

    own = conditional_affine_coupling(SHAPE, 2, net=Net())
    x, context = torch.randn(5, *SHAPE), torch.randn(5, 2)
    own.condition(context).forward_and_ladj(x)
    constant = context[:, :, None, None].expand(5, 2, 2, 3)
    assert torch.equal(seen[0], torch.cat([x[:, :1], constant], 1))


@pytest.mark.parametrize(
    ("hidden_dims", "channels", "num_blocks"), [(None, 32, 2), ((8,), 8, 1), ((5, 5, 5), 5, 3)]
)
def test_hidden_dims_are_channels_by_block(hidden_dims, channels, num_blocks):
    net = affine_coupling((4, 2, 2), hidden_dims, activation=nn.SiLU).net
    first, *blocks, activation, last = net.net
    assert (first.in_channels, first.out_channels) == (2, channels)
    assert len(blocks) == num_blocks
    assert isinstance(activation, nn.SiLU)
    assert (last.in_channels, last.out_channels) == (channels, 4)
    assert (
        affine_coupling((4, 2, 2), hidden_dims, mask="checkerboard").net.net[-1].out_channels == 8
    )


@families
@masks
def test_function_transforms(family, mask):
    transform = make(family, mask=MASKS[mask][0])
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    for run in (transform.forward_and_ladj, transform.inverse_and_ladj):
        torch.testing.assert_close(torch.vmap(run)(x), run(x))
        jacobian = torch.vmap(torch.func.jacrev(lambda x, run=run: run(x)[0]))(x)
        expected = torch.linalg.slogdet(jacobian.reshape(4, 18, 18))[1]
        torch.testing.assert_close(expected, run(x)[1])


@families
@pytest.mark.parametrize("mask", ["channel", "checkerboard"])
def test_empty_batch(family, mask):
    y, ladj = make(family, mask=mask).forward_and_ladj(torch.zeros(0, *SHAPE).double())
    assert y.shape == (0, *SHAPE)
    assert ladj.shape == (0,)


@pytest.mark.parametrize("mask", ["channel", "checkerboard"])
def test_in_a_distribution(mask):
    stack = ComposeFlow(
        [
            make("affine", (1, 4, 4), mask="checkerboard"),
            Squeeze(2),
            make("spline", (4, 2, 2), mask=mask),
        ]
    )
    base = dist.Normal(torch.zeros(1, 4, 4).double(), 1.0).to_event(3)
    flow = dist.TransformedDistribution(base, [stack])
    assert flow.event_shape == (4, 2, 2)
    y = flow.sample((5,))
    log_prob = flow.log_prob(y.clone())
    assert log_prob.shape == (5,)
    jacobian = torch.autograd.functional.jacobian(stack.inv._call, y[3])
    x = stack.inverse_and_ladj(y)[0]
    expected = base.log_prob(x)[3] + torch.linalg.slogdet(jacobian.reshape(16, 16))[1]
    torch.testing.assert_close(log_prob[3], expected)


@families
@pytest.mark.parametrize("mask", ["alternating", "checkerboard"])
def test_loads_on_meta(family, mask):
    with torch.device("meta"):
        transform = FAMILIES[family](SHAPE, HIDDEN, mask=mask)
    saved = make(family, mask=mask)
    transform.load_state_dict(saved.state_dict(), assign=True)
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(transform.forward_and_ladj(x), saved.forward_and_ladj(x))


@pytest.mark.parametrize(
    "masks", [("channel", "alternating"), ("checkerboard", MIXED[:2])], ids=["channels", "pixels"]
)
def test_state_of_another_mask_is_refused(masks):
    shape = (4, 2, 2) if masks[0] == "channel" else (2, 2, 3)
    one, other = (affine_coupling(shape, HIDDEN, mask=mask) for mask in masks)
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match=r"split.mask: .* build the transform with the mask"):
        one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": (3, 2)}, r"input_dim: expected D or \(C, H, W\), got \(3, 2\)"),
        ({"input_dim": (3, 0, 2)}, "input_dim: expected a positive integer, got 0"),
        ({"input_dim": (1, 1, 1)}, "input_dim: a coupling layer needs two elements at least"),
        ({"input_dim": (1, 4, 4)}, "one channel can be split by 'checkerboard'"),
        ({"input_dim": 4, "mask": "checkerboard"}, r"for an event of shape \(4,\), got 'checker"),
        ({"input_dim": 4, "mask": "channel"}, "mask: expected one of .* got 'channel'"),
        ({"mask": "stripes"}, "mask: expected one of .*'channel', 'checkerboard'.* got 'stripes'"),
        ({"mask": torch.ones(SHAPE).bool()}, "mask: expected some elements to pass"),
        (
            {"mask": torch.tensor([True, False, True])},
            r"mask: expected booleans of shape \(3, 2, 3",
        ),
        ({"hidden_dims": (4, 5)}, "hidden_dims: expected equal numbers of channels"),
        ({"hidden_dims": ()}, "hidden_dims: expected equal numbers of channels"),
        ({"hidden_dims": (4,), "net": nn.Identity()}, "give them or net, not both"),
    ],
)
@families
def test_refuses(family, options, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[family](**{"input_dim": SHAPE, **options})


@families
def test_wrong_shapes(family):
    transform = FAMILIES[family](SHAPE)
    with pytest.raises(
        ValueError, match=r"x: expected a tensor of shape \(\*, 3, 2, 3\), got \(5, 3, 3, 2\)"
    ):
        transform(torch.zeros(5, 3, 3, 2))
    with pytest.raises(
        ValueError, match=r"y: expected a tensor of shape \(\*, 3, 2, 3\), got \(2, 3\)"
    ):
        transform.inv(torch.zeros(2, 3))
    wrong = FAMILIES[family](SHAPE, net=nn.Conv2d(1, 3, 1))
    with pytest.raises(
        ValueError,
        match=r"net: expected an output of shape .* transformed elements or channels, got",
    ):
        wrong(torch.zeros(2, *SHAPE))
    with pytest.raises(ValueError, match=r"condition\(context\) first"):
        FAMILIES[family](SHAPE, context_dim=2)(torch.zeros(SHAPE))


def test_repr():
    assert repr(affine_coupling((3, 8, 8), mask="checkerboard", flip=True)) == (
        "Coupling((3, 8, 8), transformer=Affine(), mask='checkerboard', flip=True)"
    )
