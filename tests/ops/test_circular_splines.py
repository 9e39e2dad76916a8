"""Circular splines: round trips, slopes, continuity around the circle, gradients."""

import math

import pytest
import torch

from pyro_flows_ext.ops import circular_rq_spline, wrap

DIRECTIONS = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def drawn(K, n=300, scale=1.0, dtype=torch.float64):
    x = (2 * torch.rand(n, dtype=torch.float64) - 1) * math.pi
    return x.to(dtype), (scale * torch.randn(n, 3 * K + 1, dtype=torch.float64)).to(dtype)


def apart(a, b):
    """The distance of angles."""
    return wrap(a - b).abs().max()


@pytest.mark.parametrize("K", [1, 2, 8])
@DIRECTIONS
@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_round_trip(K, inverse, scale):
    x, raw = drawn(K, scale=scale)
    y, ladj = circular_rq_spline(x, raw, inverse=inverse)
    assert y.min() >= -math.pi
    assert y.max() < math.pi
    back, other = circular_rq_spline(y, raw, inverse=not inverse)
    assert apart(back, x) < 1e-8
    torch.testing.assert_close(other, -ladj, rtol=0, atol=1e-7)


@DIRECTIONS
def test_slopes_are_those_of_autograd(inverse):
    x, raw = drawn(5)
    x.requires_grad_()
    y, ladj = circular_rq_spline(x, raw, inverse=inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log(), ladj)


@DIRECTIONS
def test_value_and_slope_are_continuous_around_the_circle(inverse):
    _, raw = drawn(4)
    before, after = torch.tensor([math.pi - 1e-10, -math.pi + 1e-10], dtype=torch.float64).unbind()
    (y0, l0), (y1, l1) = (
        circular_rq_spline(x.expand(300), raw, inverse=inverse) for x in (before, after)
    )
    assert apart(y0, y1) < 1e-6
    torch.testing.assert_close(l0, l1, rtol=0, atol=1e-6)


def test_zero_is_the_identity_and_the_last_parameter_turns():
    x = drawn(3)[0]
    raw = torch.zeros(10).double()
    y, ladj = circular_rq_spline(x, raw)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros_like(x), rtol=0, atol=1e-12)
    raw[-1] = 2.0
    assert apart(circular_rq_spline(x, raw)[0], x + 2) < 1e-12


@DIRECTIONS
def test_gradients(inverse):
    x, raw = drawn(3, n=8)
    x, raw = x.requires_grad_(), raw.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, raw: circular_rq_spline(x, raw, inverse=inverse), (x, raw)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrap_stays_within_a_turn(dtype):
    tiny = torch.finfo(dtype).tiny
    angles = torch.tensor(
        [-math.pi, math.pi, 0.0, -math.pi - tiny, 7.0, -7.0, 1e4, 3 * math.pi]
    ).to(dtype)
    angles = torch.cat(
        [angles, torch.nextafter(angles, angles - 1), torch.nextafter(angles, angles + 1)]
    )
    found = wrap(angles)
    assert found.min() >= -math.pi - 1e-6
    assert (found < torch.tensor(math.pi, dtype=dtype)).all()
    torch.testing.assert_close(
        found.sin(), angles.sin(), rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-9
    )


def test_wrong_shapes_are_named():
    with pytest.raises(
        ValueError, match=r"raw: expected shape \(\*, 3K \+ 1\) for K bins, .*got \(5,\)"
    ):
        circular_rq_spline(torch.zeros(3), torch.zeros(5))
