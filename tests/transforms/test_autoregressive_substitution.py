"""The inverse of autoregressive layers one variable after the other: equal to sweeps over all of them."""

import pytest
import torch
from autoregressive_layers import perturb

from pyro_flows_ext.nn import made
from pyro_flows_ext.ops import fixed_point
from pyro_flows_ext.transforms import (
    Additive,
    Affine,
    Autoregressive,
    CircularSpline,
    RationalQuadratic,
)

DIM = 19  # more than a block of variables
ORDER = [(7 * i + 3) % DIM for i in range(DIM)]
TRANSFORMERS = {
    "additive": Additive(),
    "affine": Affine(),
    "spline": RationalQuadratic(num_bins=4),
    "circular": CircularSpline(num_bins=3),
}
TRANSFORMER = pytest.mark.parametrize("transformer", TRANSFORMERS.values(), ids=TRANSFORMERS)
NETWORKS = {
    "default": {},
    "linear": {"hidden_dims": ()},
    "narrow": {"hidden_dims": (5, 30), "activation": torch.nn.ReLU},
    "plain": {"hidden_dims": (32, 32), "residual": False, "activation": torch.nn.Sigmoid},
    "residual": {"hidden_dims": (24, 24, 24)},
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(made, "MIN_PARAMS", 1)


@pytest.fixture
def swept(monkeypatch):
    """A list that grows with every inverse by sweeps."""
    calls, sweep = [], fixed_point._swept
    monkeypatch.setattr(fixed_point, "_swept", lambda *args: calls.append(1) or sweep(*args))
    return calls


def layer(transformer, **options):
    transform = Autoregressive(DIM, transformer=transformer, order=ORDER, **options)
    return perturb(transform.double(), scale=0.5)


def both(transform, y, monkeypatch):
    """The inverse by substitution, and by sweeps."""
    found = transform.inverse_and_ladj(y)
    with monkeypatch.context() as patch:
        patch.setattr(made, "MIN_PARAMS", 10**9)
        return found, transform.inverse_and_ladj(y)


@TRANSFORMER
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("context", [None, (2,), (5, 2), (3, 1, 2)], ids=str)
def test_is_the_inverse_by_sweeps(transformer, options, context, monkeypatch, swept):
    transform = layer(transformer, context_dim=2 if context else 0, **options)
    if context:
        transform = transform.condition(torch.randn(context, dtype=torch.float64))
    y = torch.randn(3, 5, DIM, dtype=torch.float64).clamp(-3, 3)  # the circle's, too
    with torch.no_grad():
        found, expected = both(transform, y, monkeypatch)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            transform.forward_and_ladj(found[0])[0], y, rtol=1e-10, atol=1e-10
        )
    assert len(swept) == 1, "sweeps in one of the two"


@TRANSFORMER
def test_gradients_are_those_of_sweeps(transformer, monkeypatch, swept):
    transform = layer(transformer, context_dim=2)
    context = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, DIM, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    found = []
    for x, ladj in both(transform.condition(context), y, monkeypatch):
        loss = (weights[0] * x).sum() + (weights[1] * ladj).sum()
        found.append(torch.autograd.grad(loss, [y, context, *transform.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
    assert len(swept) == 1


def test_computes_every_variable_once(monkeypatch):
    calls, inverse = [], Affine.inverse

    def counted(self, y, theta):
        calls.append((tuple(y.shape), tuple(theta.shape)))
        return inverse(self, y, theta)

    monkeypatch.setattr(Affine, "inverse", counted)
    with torch.no_grad():
        layer(Affine()).inverse_and_ladj(torch.randn(40, DIM, dtype=torch.float64))
    # The first call is over one row of zeros, and finds out whether there will be a graph.
    assert calls == [((40, DIM), (1, 2, DIM))] + [((40,), (2, 40))] * DIM


class Stretched(Affine):
    """With a factor of its own for every element."""

    is_uniform = False

    def __init__(self, factor):
        self.factor = factor

    def forward(self, x, theta):
        y, ladj = super().forward(x, theta)
        return self.factor * y, ladj + self.factor.log()

    def inverse(self, y, theta):
        x, ladj = super().inverse(y / self.factor, theta)
        return x, ladj - self.factor.log()


@pytest.mark.parametrize("rows", [3, DIM])
def test_maps_that_differ_between_elements_are_swept(rows, swept):
    transform = layer(Stretched(torch.rand(DIM, dtype=torch.float64) + 0.5))
    y = torch.randn(rows, DIM, dtype=torch.float64)
    with torch.no_grad():
        x = transform.inverse_and_ladj(y)[0]
        torch.testing.assert_close(transform.forward_and_ladj(x)[0], y, rtol=1e-10, atol=1e-10)
    assert swept


@pytest.mark.parametrize(
    ("options", "rows", "why"),
    [({}, 15, "few rows"), ({"activation": torch.nn.ELU}, 4000, "another activation")],
    ids=["rows", "activation"],
)
def test_sweeps_elsewhere(options, rows, why, monkeypatch, swept):
    monkeypatch.setattr(made, "MIN_PARAMS", 512)
    transform = layer(RationalQuadratic(), **options)
    with torch.no_grad():
        transform.inverse_and_ladj(torch.randn(rows, DIM, dtype=torch.float64))
    assert swept, why


def test_rows_that_are_not_finite_are_swept(monkeypatch, swept):
    transform, y = layer(Affine()), torch.randn(6, DIM, dtype=torch.float64)
    y[1], y[2] = torch.nan, torch.inf
    with torch.no_grad():
        found, expected = both(transform, y, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert len(swept) == 2
    assert found[0][[0, 3, 4, 5]].isfinite().all()


def test_keeps_the_dtype():
    transform = Autoregressive(3)
    x, ladj = transform.inverse_and_ladj(torch.randn(7, 3))
    assert (x.dtype, ladj.dtype, x.shape, ladj.shape) == (
        torch.float32,
        torch.float32,
        (7, 3),
        (7,),
    )
