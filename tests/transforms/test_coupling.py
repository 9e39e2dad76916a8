"""Coupling layers: masks, networks, formulas, and what they refuse."""

import copy
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_flows_ext.ops import rq_spline
from pyro_flows_ext.testing import POINTS, perturb
from pyro_flows_ext.transforms import (
    Additive,
    ComposeFlow,
    Coupling,
    Transformer,
    affine_coupling,
    conditional_affine_coupling,
    spline_coupling,
)

HIDDEN = (4,)
FAMILIES = {
    "additive": partial(Coupling, transformer=Additive()),
    "affine": affine_coupling,
    "spline": spline_coupling,
}
MASKS = {
    "half": ("half", [True, True, False, False, False]),
    "alternating": ("alternating", [True, False, True, False, True]),
    "tensor": (torch.tensor([False, False, True, False, True]), [False, False, True, False, True]),
    "list": ([False, True, True, True, True], [False, True, True, True, True]),
}

families = pytest.mark.parametrize("family", FAMILIES)
masks = pytest.mark.parametrize("mask", MASKS)
flips = pytest.mark.parametrize("flip", [False, True], ids=["", "flipped"])


def make(family, dim=5, **options):
    return perturb(FAMILIES[family](dim, HIDDEN, **options).double())


# The catalogue has each family once; here is every option that changes the path of a pass.
VARIANTS = {
    "mask": lambda: affine_coupling(4, HIDDEN, mask=[True, False, False, True]),
    "flip": lambda: spline_coupling(3, HIDDEN, flip=True),
    "alternating-flip": lambda: Coupling(
        3, HIDDEN, transformer=Additive(), mask="alternating", flip=True
    ),
    "net": lambda: affine_coupling(3, net=nn.Linear(1, 4)),
    "inverse": lambda: spline_coupling(3, HIDDEN, num_bins=3, bound=1.5).inv,
    "stack": lambda: ComposeFlow([spline_coupling(3, HIDDEN, flip=bool(i % 2)) for i in range(2)]),
}


@pytest.mark.parametrize(
    ("make", "point", "dtype"),
    [
        pytest.param(make, POINTS[number], dtype, id=f"{name}-{POINTS[number]}-{str(dtype)[6:]}")
        for name, make in VARIANTS.items()
        for number in (1, 2, 3, 5, 7, 9, 10, 13)
        for dtype in POINTS[number].dtypes
        if number != 13 or name == "mask"
    ],
)
def test_contract_of_variants(make, point, dtype):
    point.check(make, dtype=dtype, event_shape=(4 if make is VARIANTS["mask"] else 3,))


@families
@masks
@flips
def test_mask_says_what_passes_and_what_depends_on_what(family, mask, flip):
    given, expected = MASKS[mask]
    passes = torch.tensor(expected) ^ flip
    transform = make(family, mask=given, flip=flip, activation=nn.Tanh)  # no unit is dead
    assert torch.equal(transform.mask, passes)
    x = 0.5 * torch.randn(5, dtype=torch.float64)
    y, _ = transform.forward_and_ladj(x)
    assert torch.equal(y[passes], x[passes])
    assert (y[~passes] != x[~passes]).all()
    jacobian = torch.autograd.functional.jacobian(lambda x: transform.forward_and_ladj(x)[0], x)
    depends = torch.eye(5, dtype=torch.bool) | (~passes.unsqueeze(1) & passes)
    assert torch.equal(jacobian != 0, depends)


@families
@masks
@flips
def test_starts_at_the_identity(family, mask, flip):
    transform = FAMILIES[family](5, mask=MASKS[mask][0], flip=flip)
    x = 3 * torch.randn(50, 5)
    for run in (transform.forward_and_ladj, transform.inverse_and_ladj):
        y, ladj = run(x)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(ladj, torch.zeros(50), rtol=0, atol=1e-5)


def test_formulas():
    """Each family against its formula, with the parameters that its network gives."""
    x = torch.randn(7, 5, dtype=torch.float64)
    a, b = x[:, :2], x[:, 2:]

    transform = make("additive")
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, torch.cat([a, b + transform.net(a)], -1))
    assert torch.equal(ladj, torch.zeros(7, dtype=x.dtype))

    transform = make("affine")
    y, ladj = transform.forward_and_ladj(x)
    t, s = transform.net(a).split(3, -1)
    s = torch.log(torch.tensor(1000.0).double()) * torch.tanh(
        s / torch.log(torch.tensor(1000.0).double())
    )
    torch.testing.assert_close(y, torch.cat([a, b * s.exp() + t], -1))
    torch.testing.assert_close(ladj, s.sum(-1))

    transform = make("spline", num_bins=4, bound=2.0)
    y, ladj = transform.forward_and_ladj(x)
    raw = transform.net(a).reshape(7, 11, 3).transpose(1, 2)
    value, slopes = rq_spline(b, raw, bound=2.0)
    torch.testing.assert_close(y, torch.cat([a, value], -1))
    torch.testing.assert_close(ladj, slopes.sum(-1))


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_affine_scale_is_bounded(size):
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0], [size]]))
        net.bias.zero_()
    transform = affine_coupling(2, net=net)
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y[:, 1], torch.tensor([1e3, 1e-3]))
    torch.testing.assert_close(transform.inverse_and_ladj(y)[0], x)
    assert ladj.abs().max() < 6.91


@families
@pytest.mark.parametrize("dim", [2, 3, 8])
def test_a_net_of_ones_own(family, dim):
    """Any module will do, and its output is laid out parameter by parameter."""
    plain = make(family, dim=dim)
    net = nn.Sequential(nn.Identity(), plain.net)
    own = FAMILIES[family](dim, net=net)
    x = torch.randn(6, dim, dtype=torch.float64)
    torch.testing.assert_close(own.forward_and_ladj(x), plain.forward_and_ladj(x))
    assert own.net is net
    assert set(own.parameters()) == set(net.parameters())


@families
def test_a_conditional_net_of_ones_own_sees_the_context_last(family):
    plain = perturb(FAMILIES[family](5, HIDDEN, context_dim=3).double())
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain.net

        def forward(self, joined):
            seen.append(joined)
            return self.net(joined)

    own = FAMILIES[family](5, net=Net(), context_dim=3)
    x, context = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    y, ladj = own.condition(context).forward_and_ladj(x)
    assert torch.equal(seen[0], torch.cat([x[:, :2], context], -1))
    torch.testing.assert_close((y, ladj), plain.condition(context).forward_and_ladj(x))


@families
def test_hidden_layers_and_activation(family):
    transform = FAMILIES[family](4, (7, 5), activation=nn.SiLU)
    layers = list(transform.net)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]
    assert [layers[i].out_features for i in (0, 2)] == [7, 5]
    layers = list(FAMILIES[family](4).net)
    assert [layers[i].out_features for i in (0, 2)] == [64, 64]


@families
@pytest.mark.parametrize(
    ("context_batch", "x_batch"), [((), (3,)), ((3,), ()), ((3,), (3,)), ((4, 1), (3,))], ids=str
)
@pytest.mark.parametrize("mask", ["half", "alternating"])
def test_contexts_broadcast(family, context_batch, x_batch, mask):
    transform = perturb(FAMILIES[family](5, HIDDEN, mask=mask, context_dim=2).double())
    context, x = torch.randn(*context_batch, 2).double(), torch.randn(*x_batch, 5).double()
    batch = torch.broadcast_shapes(context_batch, x_batch)
    full = transform.condition(context.expand(*batch, 2))
    for method in ("forward_and_ladj", "inverse_and_ladj"):
        y, ladj = getattr(transform.condition(context), method)(x)
        assert y.shape == (*batch, 5)
        assert ladj.shape == batch
        torch.testing.assert_close((y, ladj), getattr(full, method)(x.expand(*batch, 5)))


@families
def test_function_transforms(family):
    transform = make(family, mask="alternating")
    x = torch.randn(6, 5, dtype=torch.float64)
    for run in (transform.forward_and_ladj, transform.inverse_and_ladj):
        torch.testing.assert_close(torch.vmap(run)(x), run(x))
        jacobian = torch.vmap(torch.func.jacrev(lambda x, run=run: run(x)[0]))(x)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], run(x)[1])


@families
def test_empty_batch(family):
    y, ladj = make(family).forward_and_ladj(torch.zeros(0, 5, dtype=torch.float64))
    assert y.shape == (0, 5)
    assert ladj.shape == (0,)


@pytest.mark.slow
def test_density_of_a_stack_integrates_to_one():
    stack = ComposeFlow(
        [
            # Milder than elsewhere: the grid resolves the density.
            perturb(spline_coupling(2, HIDDEN, flip=bool(i % 2)).double(), scale=0.4)
            for i in range(4)
        ]
    )
    base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    flow = dist.TransformedDistribution(base, [stack])
    axis = torch.linspace(-8, 8, 601, dtype=torch.float64)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp()
    total = density.sum() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=5e-3)


@families
def test_moves_with_to_and_loads_on_meta(family):
    with torch.device("meta"):
        transform = FAMILIES[family](5, HIDDEN, mask="alternating")
    saved = make(family, mask="alternating")
    transform.load_state_dict(saved.state_dict(), assign=True)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(transform.forward_and_ladj(x), saved.forward_and_ladj(x))
    saved.to("meta")
    assert all(buffer.is_meta for buffer in saved.buffers())
    assert {"split.mask"} < {name for name, _ in saved.named_buffers()}


@pytest.mark.parametrize("where", ["alone", "in-a-stack"])
def test_state_of_another_mask_is_refused(where):
    # Four elements in halves either way: every shape agrees.
    one, other = affine_coupling(4, HIDDEN), affine_coupling(4, HIDDEN, mask="alternating")
    if where == "in-a-stack":
        one, other = ComposeFlow([one]), ComposeFlow([other])
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match="build the transform with the mask"):
        one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 1}, "input_dim: a coupling layer needs two elements at least"),
        ({"input_dim": 0}, "input_dim: expected a positive integer"),
        ({"mask": "checkered"}, "mask: expected one of .*'half', 'alternating'.* got 'checkered'"),
        ({"mask": torch.ones(4).bool()}, "mask: expected some elements to pass"),
        ({"mask": torch.zeros(4).bool()}, "mask: expected some elements to pass"),
        ({"mask": torch.tensor([True, False])}, r"mask: expected booleans of shape \(4,\), got"),
        ({"mask": torch.tensor([1, 0, 1, 0])}, r"mask: expected booleans .* got torch.int64"),
        ({"net": nn.Linear(2, 4), "hidden_dims": (3,)}, "give them or net, not both"),
    ],
    ids=["one", "none", "name", "all-pass", "none-passes", "shape", "dtype", "net-and-hidden"],
)
@families
def test_refuses(family, options, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[family](**{"input_dim": 4, **options})


@pytest.mark.parametrize("options", [{"num_bins": 0}, {"bound": 0.0}, {"bound": -1.0}], ids=str)
def test_spline_refuses(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected a positive"):
        spline_coupling(4, **options)


@families
def test_wrong_shapes(family):
    transform = FAMILIES[family](4)
    with pytest.raises(ValueError, match=r"x: expected a tensor of shape \(\*, 4\), got \(2, 3\)"):
        transform(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"y: expected a tensor of shape \(\*, 4\), got \(2, 5\)"):
        transform.inv(torch.zeros(2, 5))
    wrong = FAMILIES[family](4, net=nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"net: expected an output of shape .* got \(2, 3\)"):
        wrong(torch.zeros(2, 4))


@families
def test_context_is_needed(family):
    conditional = FAMILIES[family](4, context_dim=3)
    with pytest.raises(ValueError, match=r"condition\(context\) first"):
        conditional(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"context: expected a tensor of shape \(\*, 3\)"):
        conditional.condition(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="context_dim: expected an integer >= 0"):
        FAMILIES[family](4, context_dim=-1)
    with pytest.raises(ValueError, match="context_dim: expected a positive integer"):
        conditional_affine_coupling(4, 0)


def test_repr():
    assert repr(affine_coupling(4, flip=True)) == (
        "Coupling(4, transformer=Affine(), mask='half', flip=True)"
    )
    assert repr(spline_coupling(2, mask=[True, False])) == (
        "Coupling(2, transformer=RationalQuadratic(num_bins=8, bound=5), mask='custom')"
    )
    assert "context_dim=3" in repr(conditional_affine_coupling(4, 3))


class Scale(Transformer):
    """A user's map, with an inverse of its own."""

    num_params = 1

    def forward(self, x, theta):
        log_scale = theta.squeeze(-2).tanh()
        return x * log_scale.exp(), log_scale

    def inverse(self, y, theta):
        log_scale = theta.squeeze(-2).tanh()
        return y * (-log_scale).exp(), -log_scale


class Learned(Scale, nn.Module):
    """One that has a parameter of its own."""

    def __init__(self):
        nn.Module.__init__(self)
        self.log_base = nn.Parameter(torch.zeros(()))

    def forward(self, x, theta):
        y, log_scale = super().forward(x, theta)
        return y * self.log_base.exp(), log_scale + self.log_base

    def inverse(self, y, theta):
        x, log_scale = super().inverse(y * (-self.log_base).exp(), theta)
        return x, log_scale - self.log_base


def test_a_transformer_of_ones_own():
    for point in (1, 2, 3, 7):
        POINTS[point].check(lambda: Coupling(3, HIDDEN, transformer=Scale()))
    with pytest.raises(TypeError, match="transformer: expected a Transformer"):
        Coupling(3, transformer=Scale)
    with pytest.raises(TypeError, match="abstract"):
        type("Bare", (Transformer,), {"num_params": 1})()


def test_a_transformer_with_parameters_trains_with_the_layer():
    assert "transformer.log_base" in Coupling(3, transformer=Learned()).state_dict()
    for point in (1, 2, 3, 7, 9):
        POINTS[point].check(lambda: Coupling(3, HIDDEN, transformer=Learned()))
