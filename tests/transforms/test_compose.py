"""Composition: one transform out of several, in values, log-dets, shapes and errors."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_transform import ComposeTransformModule

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    ComposeFlow,
    ElementwiseAffine,
    FlowTransform,
    conditional_planar,
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
    assert repr(whole).splitlines()[1] == "  (0): Planar(3, num_transforms=1)"


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

    domain = codomain = torch.distributions.constraints.real

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
    [dist.transforms.Planar(2), torch.nn.Linear(2, 2), conditional_planar(2, 2)],
    ids=lambda part: type(part).__name__,
)
def test_foreign_parts(part):
    with pytest.raises(TypeError, match=f"expected FlowTransforms, got a {type(part).__name__}"):
        ComposeFlow([planar(2), part])
