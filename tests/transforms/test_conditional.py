"""Conditional forms: parameters by datum from a network, and `bind`, which they stand on."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import (
    ConditionalComposeTransformModule,
    ConditionalTransformedDistribution,
)

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    ConditionalFlow,
    ElementwiseAffine,
    conditional_planar,
    conditional_radial,
    conditional_sylvester,
    planar,
    sylvester,
)

FAMILIES = {
    "planar": conditional_planar,
    "radial": conditional_radial,
    "orthogonal": lambda *args, **kw: conditional_sylvester(*args, kind="orthogonal", **kw),
    "householder": lambda *args, **kw: conditional_sylvester(*args, kind="householder", **kw),
    "triangular": lambda *args, **kw: conditional_sylvester(*args, kind="triangular", **kw),
}
families = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


@families
@pytest.mark.parametrize("num_layers", [1, 3])
def test_starts_as_the_unconditional_transform(make, num_layers):
    conditional = make(3, 2, num_layers=num_layers)
    x = torch.randn(5, 3)
    bound = conditional.condition(torch.randn(5, 2))
    expected = conditional.transform.forward_and_ladj(x)
    torch.testing.assert_close(bound.forward_and_ladj(x), expected)


@families
def test_every_parameter_depends_on_the_context(make):
    conditional = perturb(make(3, 2))
    a, b = (conditional.condition(context) for context in torch.randn(2, 2))
    for name, _ in conditional.transform.named_parameters():
        assert not torch.isclose(getattr(a, name), getattr(b, name)).any()


@families
@pytest.mark.parametrize("hidden_dims", [None, (), (5,), (5, 4)], ids=str)
def test_hidden_dims(make, hidden_dims):
    conditional = make(2, 3, hidden_dims)
    widths = [part.out_features for part in conditional.hyper.net if hasattr(part, "out_features")]
    assert tuple(widths[:-1]) == ((64, 64) if hidden_dims is None else hidden_dims)
    size = sum(p.numel() for p in conditional.transform.parameters())
    assert widths[-1] == size


@families
@pytest.mark.parametrize("batch", [(), (4,), (3, 4)], ids=str)
def test_batch_shape_is_that_of_the_context(make, batch):
    bound = make(3, 2).condition(torch.randn(*batch, 2))
    assert bound.batch_shape == batch
    assert bound.forward_shape((3,)) == (*batch, 3)
    assert bound.inverse_shape((4, 3)) == (*torch.broadcast_shapes(batch, (4,)), 3)
    assert bound.inv.batch_shape == batch
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    density = ConditionalTransformedDistribution(base, [make(3, 2)])
    assert density.condition(torch.randn(*batch, 2)).batch_shape == batch


@families
def test_gradients_reach_the_network_and_the_context(make):
    conditional, context = perturb(make(3, 2)), torch.randn(5, 2, requires_grad=True)
    x, ladj = conditional.condition(context).inverse_and_ladj(torch.randn(5, 3))
    wanted = [context, *conditional.parameters()]
    grads = torch.autograd.grad((x**2).sum() + ladj.sum(), wanted)
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


@families
@pytest.mark.parametrize("shape", [(), (3,), (5, 1)], ids=str)
def test_bad_contexts(make, shape):
    with pytest.raises(ValueError, match=r"context: expected shape \(\*, 2\), got"):
        make(3, 2).condition(torch.zeros(shape))


def test_any_flow_can_be_made_conditional():
    conditional = perturb(ConditionalFlow(ElementwiseAffine(2), 3, (4,)))
    context = torch.randn(5, 3)
    bound = conditional.condition(context)
    offsets = conditional.hyper(context)
    torch.testing.assert_close(bound.loc, conditional.transform.loc + offsets["loc"])
    assert repr(conditional) == "ConditionalFlow(2, context_dim=3)"


def test_conditional_compose():
    parts = [perturb(conditional_planar(2, 3, (4,))), planar(2), conditional_radial(2, 3).inv]
    stack = ConditionalComposeTransformModule(parts)
    assert len(list(stack.parameters())) == sum(len(list(part.parameters())) for part in parts)
    context, x = torch.randn(5, 3), torch.randn(5, 2)
    whole = stack.condition(context)
    value = x
    for part in parts:
        value = (part.condition(context) if hasattr(part, "condition") else part)(value)
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
