"""Transforms at a context: parameters by datum from a hyper-network, and `bind`, on which this stands."""

import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import (
    ConditionalComposeTransformModule,
    ConditionalTransform,
    ConditionalTransformedDistribution,
    ConditionalTransformModule,
)

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    Autoregressive,
    ComposeFlow,
    Coupling,
    ElementwiseAffine,
    FlowTransform,
    HouseholderLinear,
    HouseholderSylvester,
    LULinear,
    OrthogonalSylvester,
    Permute,
    Planar,
    QRLinear,
    Radial,
    ResidualFlow,
    SinhArcsinh,
    TriangularSylvester,
    conditional_planar,
    conditional_radial,
    planar,
    sylvester,
)

# Families whose parameters come from a hyper-network.
FAMILIES = [
    Planar,
    Radial,
    OrthogonalSylvester,
    HouseholderSylvester,
    TriangularSylvester,
    ElementwiseAffine,
    SinhArcsinh,
    LULinear,
    QRLinear,
    HouseholderLinear,
]
NETWORKS = [Coupling, Autoregressive, ResidualFlow]
families = pytest.mark.parametrize("make", FAMILIES)
every = pytest.mark.parametrize("make", [*FAMILIES, *NETWORKS])


@families
def test_starts_as_the_unconditional_transform(make):
    conditional = make(3, context_dim=2)
    x = torch.randn(5, 3)
    bound = conditional.condition(torch.randn(5, 2))
    expected = conditional.bind({}).forward_and_ladj(x)  # at its own parameters
    torch.testing.assert_close(bound.forward_and_ladj(x), expected)


@pytest.mark.parametrize("make", NETWORKS)
def test_networks_start_at_the_identity_for_every_context(make):
    x = torch.randn(5, 3)
    y, ladj = make(3, context_dim=2).eval().condition(torch.randn(5, 2)).forward_and_ladj(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros(5), rtol=0, atol=1e-5)


@families
def test_every_parameter_depends_on_the_context(make):
    conditional = perturb(make(3, context_dim=2))
    a, b = (conditional.condition(context) for context in torch.randn(2, 2))
    for name, _ in conditional.named_parameters(recurse=False):
        assert not torch.isclose(getattr(a, name), getattr(b, name)).any()


@families
@pytest.mark.parametrize("hidden_dims", [None, (), (5,), (5, 4)], ids=str)
def test_hidden_dims(make, hidden_dims):
    conditional = make(2, context_dim=3, hidden_dims=hidden_dims)
    widths = [part.out_features for part in conditional.hyper.net if hasattr(part, "out_features")]
    assert tuple(widths[:-1]) == ((64, 64) if hidden_dims is None else hidden_dims)
    size = sum(p.numel() for p in conditional.parameters(recurse=False))
    assert widths[-1] == size


@every
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)], ids=str)
def test_batch_shape_is_that_of_the_context(make, batch):
    conditional = make(3, context_dim=2)
    bound = conditional.condition(torch.randn(*batch, 2))
    assert bound.batch_shape == batch
    assert bound.forward_shape((3,)) == (*batch, 3)
    assert bound.inverse_shape((4, 3)) == (*torch.broadcast_shapes(batch, (4,)), 3)
    assert bound.inv.batch_shape == batch
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    density = ConditionalTransformedDistribution(base, [conditional])
    assert density.condition(torch.randn(*batch, 2)).batch_shape == batch


@families
def test_gradients_reach_the_network_and_the_context(make):
    conditional, context = perturb(make(3, context_dim=2)), torch.randn(5, 2, requires_grad=True)
    x, ladj = conditional.condition(context).inverse_and_ladj(torch.randn(5, 3))
    wanted = [context, *conditional.parameters()]
    grads = torch.autograd.grad((x**3).sum() + ladj.sum(), wanted)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


def test_the_same_context_is_bound_anew_after_an_update():
    conditional, context = conditional_planar(2, 2), torch.randn(5, 2)
    x = torch.randn(5, 2)
    old = conditional.condition(context)
    before = old(x)
    perturb(conditional)
    assert not torch.equal(conditional.condition(context)(x), before)
    torch.testing.assert_close(old(x), before)  # bound is bound


def test_bound_transform_shows_no_parameters_of_the_network():
    bound = conditional_planar(2, 2).condition(torch.randn(5, 2))
    assert list(bound.parameters()) == []
    assert repr(bound) == "Planar(2, num_layers=1, batch_shape=(5,))"


# --- one protocol, with and without a context ---


@pytest.mark.parametrize(
    "transform",
    [planar(2), planar(2).inv, Permute([1, 0]), ComposeFlow([planar(2)]), Coupling(2)],
    ids=lambda t: type(t).__name__,
)
def test_without_a_context_condition_returns_the_transform_itself(transform):
    assert transform.context_dim == 0
    assert transform.condition(torch.zeros(5, 2)) is transform


@every
def test_a_conditioned_transform_needs_no_further_context(make):
    bound = make(3, context_dim=2).condition(torch.zeros(5, 2))
    assert bound.context_dim == 0
    assert bound.condition(torch.zeros(7)) is bound


@every
@pytest.mark.parametrize("inverted", [False, True], ids=["plain", "inv"])
def test_a_missing_context_is_named(make, inverted):
    transform = make(3, context_dim=2)
    transform = transform.inv if inverted else transform
    message = r"expected a call of condition\(context\) first, with a context of shape \(\*, 2\), got none"
    for run in (transform, transform.inv, transform.forward_and_ladj, transform.inverse_and_ladj):
        with pytest.raises(ValueError, match=f"{make.__name__}: {message}"):
            run(torch.zeros(3))


@every
@pytest.mark.parametrize("shape", [(), (3,), (5, 1)], ids=str)
def test_bad_contexts(make, shape):
    with pytest.raises(ValueError, match=r"context: expected a tensor of shape \(\*, 2\), got"):
        make(3, context_dim=2).condition(torch.zeros(shape))


@pytest.mark.parametrize("context_dim", [-1, 1.5])
@every
def test_bad_context_dims(make, context_dim):
    with pytest.raises(ValueError, match="context_dim: expected an integer >= 0"):
        make(3, context_dim=context_dim)


def test_hidden_dims_without_a_context_are_refused():
    with pytest.raises(ValueError, match="hidden_dims: expected None where context_dim is 0"):
        Planar(3, hidden_dims=(4,))


@every
def test_pyro_takes_every_transform_for_a_conditional_one(make):
    for transform in (make(3), make(3, context_dim=2), make(3, context_dim=2).inv):
        assert isinstance(transform, ConditionalTransformModule)
        assert isinstance(transform, ConditionalTransform)
        assert isinstance(transform, torch.distributions.Transform)


def test_conditional_density_of_transforms_with_and_without_a_context():
    transforms = [planar(2), perturb(Planar(2, context_dim=3)), Coupling(2, context_dim=3).inv]
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    density = ConditionalTransformedDistribution(base, transforms)
    context, y = torch.randn(5, 3), torch.randn(5, 2)
    bound = density.condition(context)
    assert bound.batch_shape == (5,)
    rows = torch.stack([density.condition(c).log_prob(v) for c, v in zip(context, y, strict=True)])
    torch.testing.assert_close(bound.log_prob(y), rows, rtol=1e-4, atol=1e-5)


class Shift(FlowTransform):
    """A user's own family."""

    def __init__(self, dim, context_dim=0):
        super().__init__()
        self.input_dim = dim
        self.shift = torch.nn.Parameter(torch.zeros(dim))
        self.add_hyper_network(context_dim, (4,) if context_dim else None)

    def forward_and_ladj(self, x):
        y = x + self.shift
        return y, y.new_zeros(y.shape[:-1])

    def inverse_and_ladj(self, y):
        x = y - self.shift
        return x, x.new_zeros(x.shape[:-1])


def test_a_hyper_network_for_a_transform_of_ones_own():
    conditional, context = perturb(Shift(2, 3)), torch.randn(5, 3)
    bound = conditional.condition(context)
    expected = conditional.shift + conditional.hyper(context)["shift"]
    torch.testing.assert_close(bound.shift, expected)
    torch.testing.assert_close(bound(torch.zeros(2)), expected)
    twin = pickle.loads(pickle.dumps(conditional))
    torch.testing.assert_close(twin.condition(context).shift, expected)
    assert repr(conditional) == "Shift(context_dim=3)"


def test_conditional_compose():
    parts = [perturb(conditional_planar(2, 3, (4,))), planar(2), conditional_radial(2, 3).inv]
    stack = ConditionalComposeTransformModule(parts)
    assert len(list(stack.parameters())) == sum(len(list(part.parameters())) for part in parts)
    context, x = torch.randn(5, 3), torch.randn(5, 2)
    whole = stack.condition(context)
    value = x
    for part in parts:
        value = part.condition(context)(value)
    torch.testing.assert_close(whole(x), value)
    torch.testing.assert_close(whole.inv(value.clone()), x, rtol=1e-4, atol=1e-5)


# --- bind ---


def test_bind_keeps_what_it_does_not_replace():
    transform = planar(3)
    bound = transform.bind({"b": torch.full((4, 1, 1), 0.5)})
    assert bound.w is transform.w
    assert dict(bound.named_parameters()).keys() == {"w", "u"}
    assert bound.batch_shape == (4,)
    assert transform.batch_shape == ()


def test_bind_broadcasts_its_batches():
    bound = planar(3).bind({"b": torch.zeros(4, 1, 1), "u": torch.zeros(2, 1, 1, 3)})
    assert bound.batch_shape == (2, 4)
    assert bound(torch.zeros(3)).shape == (2, 4, 3)


def test_bind_does_not_touch_the_original():
    transform, x = sylvester(3), torch.randn(5, 3)
    before = transform(x)
    bound = transform.bind({"b": torch.ones(5, 1, 3)})
    assert not torch.equal(bound(x), before)
    assert transform(x) is before
    assert bound.inv is not transform.inv


@pytest.mark.parametrize("shape", [(3,), (4, 1, 2), (2, 1)], ids=str)
def test_bind_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"b: expected shape \(\*, 1, 1\), got"):
        planar(3).bind({"b": torch.zeros(shape)})
