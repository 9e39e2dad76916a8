"""Composition: one transform out of several, plain and conditional, in values, log-dets, shapes and errors."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformedDistribution
from pyro.distributions.torch_transform import ComposeTransformModule

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    ComposeFlow,
    ElementwiseAffine,
    FlowTransform,
    InverseFlow,
    ResidualFlow,
    affine_autoregressive,
    affine_coupling,
    conditional_affine_coupling,
    conditional_planar,
    conditional_radial,
    planar,
    radial,
    sylvester,
)


@pytest.fixture
def parts():
    return [perturb(part.double()) for part in (planar(3), radial(3), sylvester(3))]


def test_is_the_chain_of_its_parts(parts):
    whole, x = ComposeFlow(parts), torch.randn(5, 3, dtype=torch.float64)
    value, total = x, torch.zeros(5, dtype=torch.float64)
    for part in parts:
        value, ladj = part.forward_and_ladj(value)
        total = total + ladj
    torch.testing.assert_close(whole.forward_and_ladj(x), (value, total))
    torch.testing.assert_close(whole.inverse_and_ladj(value), (x, -total))


def test_agrees_with_the_composition_of_pyro(parts):
    x = torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = ComposeFlow(parts), ComposeTransformModule(parts)
    y = ours(x)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(ours.log_abs_det_jacobian(x, y), theirs.log_abs_det_jacobian(x, y))
    torch.testing.assert_close(ours.inv(y.clone()), theirs.inv(y.clone()))


def test_is_a_sequence_of_modules(parts):
    whole = ComposeFlow(parts)
    assert len(whole) == 3
    assert list(whole) == parts
    assert whole[1] is parts[1]
    assert whole[-1] is parts[-1]
    assert len(list(whole.parameters())) == sum(len(list(part.parameters())) for part in parts)
    assert repr(whole).splitlines()[1] == "  (0): Planar(3, num_layers=1)"


def test_nests(parts):
    x = torch.randn(5, 3, dtype=torch.float64)
    nested = ComposeFlow([ComposeFlow(parts[:2]), parts[2]])
    torch.testing.assert_close(nested.forward_and_ladj(x), ComposeFlow(parts).forward_and_ladj(x))
    assert "      (1): Radial" not in repr(nested)
    assert "    (1): Radial" in repr(nested)


def test_inverse_parts(parts):
    x = torch.randn(5, 3, dtype=torch.float64)
    there_and_back = ComposeFlow([*parts, *(part.inv for part in reversed(parts))])
    y, ladj = there_and_back.forward_and_ladj(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros_like(ladj), atol=1e-10, rtol=0)


def test_batch_shapes_of_the_parts_broadcast():
    whole = ComposeFlow([planar(3), conditional_planar(3, 2).condition(torch.randn(4, 2))])
    assert whole.batch_shape == (4,)
    assert whole.forward_shape((3,)) == whole.inverse_shape((3,)) == (4, 3)
    y, ladj = whole.forward_and_ladj(torch.randn(5, 1, 3))
    assert y.shape == (5, 4, 3)
    assert ladj.shape == (5, 4)
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1).to_event(1), [whole])
    assert density.batch_shape == (4,)


class Elementwise(FlowTransform):
    """y = 2 x on numbers, without an event dimension."""

    domain = codomain = constraints.real

    def forward_and_ladj(self, x):
        return 2 * x, torch.full_like(x, 2.0).log()

    def inverse_and_ladj(self, y):
        return y / 2, -torch.full_like(y, 2.0).log()


def test_log_dets_of_smaller_events_are_summed():
    whole = ComposeFlow([Elementwise(), planar(3)])
    y, ladj = whole.forward_and_ladj(torch.randn(5, 3))
    assert ladj.shape == (5,)
    _, inverse_ladj = whole.inverse_and_ladj(y)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-4, atol=1e-5)


class Flatten(FlowTransform):
    """A matrix `(2, 2)` as a vector `(4)`."""

    domain = constraints.independent(constraints.real, 2)

    def forward_and_ladj(self, x):
        return x.flatten(-2), x.new_zeros(x.shape[:-2])

    def inverse_and_ladj(self, y):
        return y.unflatten(-1, (2, 2)), y.new_zeros(y.shape[:-1])

    def forward_shape(self, shape):
        return torch.Size((*shape[:-2], 4))

    def inverse_shape(self, shape):
        return torch.Size((*shape[:-1], 2, 2))


@pytest.mark.parametrize(
    ("make", "dims"),
    [
        (lambda: [Flatten(), planar(4)], (2, 1)),
        (lambda: [planar(4), Flatten().inv, Elementwise()], (1, 2)),
        (lambda: [Elementwise(), planar(2), Flatten(), planar(4).inv], (2, 1)),
        (lambda: [Elementwise(), Elementwise()], (0, 0)),
        (lambda: [Elementwise(), planar(4)], (1, 1)),
        (lambda: [planar(4), Elementwise()], (1, 1)),
    ],
    ids=["narrower", "wider", "both", "numbers", "numbers-first", "numbers-last"],
)
def test_events_of_any_dimension(make, dims):
    whole = perturb(ComposeFlow(make()).double())
    assert (whole.domain.event_dim, whole.codomain.event_dim) == dims
    event = [(), (4,), (2, 2)][dims[0]]
    x = torch.randn(3, 5, *event, dtype=torch.float64)
    y, ladj = whole.forward_and_ladj(x)
    assert ladj.shape == (3, 5)
    assert y.shape == whole.forward_shape(x.shape)
    back, inverse_ladj = whole.inverse_and_ladj(y)
    torch.testing.assert_close((back, inverse_ladj), (x, -ladj))
    J = torch.autograd.functional.jacobian(lambda x: whole.forward_and_ladj(x)[0], x[0, 0])
    size = max(1, y[0, 0].numel())
    torch.testing.assert_close(ladj[0, 0], torch.linalg.slogdet(J.reshape(size, size))[1])
    base = dist.Normal(torch.zeros(event).double(), 1.0).to_event(len(event))
    density = dist.TransformedDistribution(base, [whole])
    assert (density.batch_shape, density.event_shape) == ((), y.shape[2:])
    torch.testing.assert_close(density.log_prob(y), base.log_prob(x) - ladj)


# --- the cache ---


@pytest.mark.parametrize("inverted", [False, True], ids=["part", "inverse-part"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_bound_tensors_changed_in_place_are_seen(inverted, nested):
    part = planar(3).bind({"b": torch.zeros(5, 1, 1)})
    whole = ComposeFlow([ElementwiseAffine(3), part.inv if inverted else part])
    whole = ComposeFlow([whole, radial(3)]) if nested else whole
    x = torch.randn(5, 3)
    y = whole(x)
    assert whole(x) is y
    with torch.no_grad():
        part.b.add_(1.0)  # moves no parameter, is no optimizer's step
    again = whole(x)
    torch.testing.assert_close(again, whole.forward_and_ladj(x)[0])
    assert not torch.allclose(again, y)


def test_a_context_changed_in_place_is_seen():
    context, x = torch.zeros(5, 2), torch.randn(5, 3)
    whole = perturb(ComposeFlow([affine_coupling(3, context_dim=2)])).condition(context)
    y = whole(x)
    assert whole(x) is y
    context.add_(1.0)
    assert not torch.allclose(whole(x), y)


# --- contexts ---


@pytest.fixture
def conditional_parts():
    return [
        perturb(part.double())
        for part in (
            conditional_planar(3, 2, (4,)),
            ElementwiseAffine(3),
            conditional_affine_coupling(3, 2, (4,)).inv,
            affine_coupling(3, (4,), context_dim=2),
            ComposeFlow([radial(3), affine_coupling(3, (4,), flip=True, context_dim=2)]).inv,
            ComposeFlow([conditional_radial(3, 2), planar(3)]),
        )
    ]


def at(part, context):
    """One by one, by hand."""
    if isinstance(part, InverseFlow):
        return part.inv.condition(context).inv
    return part.condition(context)


def test_condition_gives_the_chain_of_conditioned_parts(conditional_parts):
    stack = ComposeFlow(conditional_parts)
    context = torch.randn(5, 2, dtype=torch.float64)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    whole = stack.condition(context)
    assert isinstance(whole, ComposeFlow)
    assert whole.batch_shape == (5,)
    value, total = x, 0.0
    for part in conditional_parts:
        value, ladj = at(part, context).forward_and_ladj(value)
        total = total + ladj
    torch.testing.assert_close(whole.forward_and_ladj(x), (value, total))
    torch.testing.assert_close(whole.inverse_and_ladj(value), (x, -total))
    for i, row in enumerate(context):
        alone = stack.condition(row).forward_and_ladj(x[:, i])
        torch.testing.assert_close(alone, (value[:, i], total[:, i]))


def test_conditional_chain_is_a_sequence_of_modules(conditional_parts):
    stack = ComposeFlow(conditional_parts)
    assert len(stack) == len(conditional_parts)
    assert list(stack) == conditional_parts
    assert stack[-1] is conditional_parts[-1]
    names = [name for name, _ in stack.named_parameters()]
    stack.condition(torch.zeros(5, 2).double())
    assert [name for name, _ in stack.named_parameters()] == names
    assert len(names) == sum(len(list(part.parameters())) for part in conditional_parts)
    assert repr(stack).splitlines()[2] == "  (1): ElementwiseAffine(3)"


def test_conditional_chain_in_pyro_and_as_a_copy(conditional_parts):
    stack = ComposeFlow(conditional_parts)
    context = torch.randn(5, 2).double()
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    densities = [
        ConditionalTransformedDistribution(base, [each]).condition(context)
        for each in (stack, copy.deepcopy(stack), pickle.loads(pickle.dumps(stack)))
    ]
    y = densities[0].rsample()
    expected = densities[0].log_prob(y)
    for density in densities:
        torch.testing.assert_close(density.log_prob(y.clone()), expected)


def test_parts_that_expect_contexts_of_two_sizes():
    with pytest.raises(ValueError, match=r"expected one context_dim .* got \[2, 3\]"):
        ComposeFlow([conditional_planar(2, 2), planar(2), conditional_radial(2, 3)])


def test_condition_shares_parameters_and_keeps_the_class():
    class Named(ComposeFlow):
        pass

    whole = perturb(Named([planar(3), affine_coupling(3, (4,), context_dim=2)]))
    context, x = torch.randn(5, 2), torch.randn(3)
    view = whole.condition(context)
    assert type(view) is Named
    assert (view.batch_shape, whole.batch_shape) == ((5,), ())
    assert {id(p) for p in view.parameters()} == {id(p) for p in whole.parameters()}
    assert view(x).shape == (5, 3)
    assert view[0] is whole[0]
    assert whole[1].context is None
    with pytest.raises(ValueError, match=r"condition\(context\) first"):
        whole(x)


@pytest.mark.parametrize(
    "make", [affine_coupling, affine_autoregressive, ResidualFlow], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("inverted", [False, True], ids=["plain", "inv"])
def test_condition_reaches_every_family_that_reads_one(make, inverted):
    part = perturb(make(3, (4,), context_dim=2)).eval()
    part = part.inv if inverted else part
    x, context = torch.randn(5, 3), torch.randn(5, 2)
    chain = ComposeFlow([planar(3), part])
    value, _ = chain.condition(context).forward_and_ladj(x)
    other, _ = chain.condition(-context).forward_and_ladj(x)
    assert not torch.allclose(value, other)


def test_condition_where_nothing_reads_a_context():
    whole = ComposeFlow([planar(3)])
    assert whole.condition(torch.zeros(5, 2)) is whole


def test_a_chain_has_nothing_to_bind():
    whole = ComposeFlow([planar(3)])
    with pytest.raises(TypeError, match="bind the parts and compose the results"):
        whole.bind({"b": torch.zeros(5, 1, 1)})


class Mirror(ElementwiseAffine):
    @property
    def sign(self):
        return -1


def test_sign_is_the_product():
    assert ComposeFlow([planar(2), Mirror(2)]).sign == -1
    assert ComposeFlow([Mirror(2), Mirror(2)]).sign == 1


def test_no_parts():
    with pytest.raises(ValueError, match="parts: expected at least one transform, got none"):
        ComposeFlow([])


@pytest.mark.parametrize(
    "part",
    [dist.transforms.Planar(2), torch.nn.Linear(2, 2), dist.transforms.conditional_planar(2, 2)],
    ids=lambda part: type(part).__name__,
)
def test_foreign_parts(part):
    with pytest.raises(TypeError, match=f"expected FlowTransforms, got a {type(part).__name__}"):
        ComposeFlow([planar(2), part])
