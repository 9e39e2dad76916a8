"""Affine and spline layers with their networks as one operation: equal to ordinary operations in value and gradients."""

import pytest
import torch
from autoregressive_layers import perturb

from pyro_flows_ext.ops import fused
from pyro_flows_ext.transforms import (
    Autoregressive,
    Coupling,
    RationalQuadratic,
    fused_spline,
    transformers,
)

LAYERS = {
    "half": lambda: Coupling(5, (7, 7)),
    "flipped": lambda: Coupling(5, (7,), flip=True, activation=torch.nn.Tanh),
    "linear-maf": lambda: Autoregressive(4, ()),
    "maf": lambda: Autoregressive(5, (8, 8), order=[2, 0, 4, 1, 3], activation=torch.nn.ReLU),
    "residual-maf": lambda: Autoregressive(4, (8, 8, 8)),
    "context-maf": lambda: Autoregressive(4, (8, 8), context_dim=2),
    "spline": lambda: Coupling(5, (7, 7), transformer=RationalQuadratic(4, bound=1.5)),
    "flipped-spline": lambda: Coupling(
        6, (7,), flip=True, activation=torch.nn.Tanh, transformer=RationalQuadratic(1)
    ),
    "linear-spline-maf": lambda: Autoregressive(4, (), transformer=RationalQuadratic(3)),
    "spline-maf": lambda: Autoregressive(
        5, (8, 8), order=[2, 0, 4, 1, 3], transformer=RationalQuadratic(3, bound=2.0)
    ),
    "residual-spline-maf": lambda: Autoregressive(
        4, (8, 8, 8), transformer=RationalQuadratic(2), order=[3, 1, 0, 2]
    ),
    "narrow-spline-maf": lambda: Autoregressive(6, (3,), transformer=RationalQuadratic(2)),
    "context-spline-maf": lambda: Autoregressive(
        4, (8, 8), context_dim=2, transformer=RationalQuadratic(3)
    ),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request, monkeypatch):
    monkeypatch.setattr(fused, "MIN_NUMEL", 1)
    transform = perturb(request.param().double(), scale=0.7)
    if transform.context_dim:
        transform = transform.condition(torch.randn(6, 2, dtype=torch.float64))
    return transform


@pytest.fixture
def counted(monkeypatch):
    """A list that grows with every layer in one operation."""
    calls = []
    for name in ("affine_layer", "spline_layer"):
        run = getattr(transformers, name)

        def count(*args, run=run, **options):
            found = run(*args, **options)
            calls.append(found is not None)
            return found

        monkeypatch.setattr(transformers, name, count)
    return calls


def directions(layer):
    two = [layer.forward_and_ladj]
    return two if isinstance(layer, Autoregressive) else [*two, layer.inverse_and_ladj]


def plainly(monkeypatch, run, *args):
    with monkeypatch.context() as patch:
        patch.setattr(fused, "MIN_NUMEL", 10**9)
        return run(*args)


@pytest.mark.parametrize("outputs", ["both", "value", "ladj"])
def test_values_and_gradients(layer, outputs, counted, monkeypatch):
    for run in directions(layer):
        x = torch.randn(6, layer.input_dim, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(6, layer.input_dim, dtype=torch.float64), torch.randn(6).double()
        results = []
        for y, ladj in (run(x), plainly(monkeypatch, run, x)):
            loss = 0
            loss = loss + (weights[0] * y).sum() if outputs != "ladj" else loss
            loss = loss + (weights[1] * ladj).sum() if outputs != "value" else loss
            leaves = [x, *layer.parameters()]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            results.append([y, ladj, *grads])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert counted == [True] * len(directions(layer))


def test_without_a_graph(layer, counted, monkeypatch):
    x = torch.randn(6, layer.input_dim, dtype=torch.float64)
    with torch.no_grad():
        for run in directions(layer):
            torch.testing.assert_close(run(x), plainly(monkeypatch, run, x), rtol=1e-13, atol=1e-13)
    assert all(counted)
    assert counted


def test_derivatives_of_derivatives(layer):
    for run in directions(layer):
        x = torch.randn(3, layer.input_dim, dtype=torch.float64, requires_grad=True)
        if layer.batch_shape:
            x = torch.randn(6, layer.input_dim, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(run, (x,))


def test_ordinary_operations_under_func(layer, counted):
    x = torch.randn(6, layer.input_dim, dtype=torch.float64)
    expected = layer.forward_and_ladj(x)
    if not layer.batch_shape:
        found = torch.func.vmap(layer.forward_and_ladj)(x.reshape(3, 2, -1))
        torch.testing.assert_close([t.flatten(0, 1) for t in found], list(expected))
        assert counted == [True, False]


def test_hooks_of_networks_run(monkeypatch):
    monkeypatch.setattr(fused, "MIN_NUMEL", 1)
    layer, calls = Coupling(4, (8,)), []
    layer.net.register_forward_hook(lambda *_: calls.append(1))
    layer.forward_and_ladj(torch.randn(6, 4))
    assert calls


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("size", [1, 5, 20])
@pytest.mark.parametrize("kind", ["spline", "spline-maf"])
def test_splines_in_several_blocks(kind, size, rows, monkeypatch):
    layer = perturb(LAYERS[kind]().double(), scale=0.7)
    x = 2 * torch.randn(10, layer.input_dim, dtype=torch.float64)
    monkeypatch.setattr(fused_spline, "BLOCK", size)
    monkeypatch.setattr(fused_spline, "ROWS", rows)
    results = []
    for least in (1, 10**9):
        monkeypatch.setattr(fused, "MIN_NUMEL", least)
        leaf = x.clone().requires_grad_()
        y, ladj = layer.forward_and_ladj(leaf)
        loss = (y * torch.arange(5)).sum() + (ladj * torch.arange(10)).sum()
        results.append([y, ladj, *torch.autograd.grad(loss, [leaf, *layer.parameters()])])
    assert "FusedSplineLayer" not in results[1][0].grad_fn.name()
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_splines_outside_of_the_box(inverse, dtype, monkeypatch):
    monkeypatch.setattr(fused, "MIN_NUMEL", 1)
    layer = perturb(Coupling(4, (8,), transformer=RationalQuadratic(4, bound=3.0)), scale=3.0)
    layer = layer.to(dtype)
    x = torch.tensor([3.0, -3.0, 3.1, -50.0, 1e30, -torch.inf], dtype=dtype).unsqueeze(-1)
    x = torch.cat([torch.randn(6, 2, dtype=dtype), x.expand(6, 2)], -1).requires_grad_()
    y, ladj = layer.inverse_and_ladj(x) if inverse else layer.forward_and_ladj(x)
    assert "FusedSplineLayer" in y.grad_fn.name()
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros_like(ladj))
    grads = torch.autograd.grad((y.sum(-1) + ladj).sum(), [x, *layer.parameters()])
    assert torch.equal(grads[0], torch.ones_like(x))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[1:])


def test_frozen_networks(layer):
    layer.requires_grad_(False)
    x = torch.randn(6, layer.input_dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.forward_and_ladj, (x,))


def test_a_loaded_order_is_that_of_the_parameters(monkeypatch):
    monkeypatch.setattr(fused, "MIN_NUMEL", 1)
    spline = RationalQuadratic(3)
    first, second = (
        Autoregressive(4, (8,), order=order, transformer=spline).double()
        for order in ([3, 0, 2, 1], [0, 1, 2, 3])
    )
    second.load_state_dict(perturb(first).state_dict())
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(second.forward_and_ladj(x), first.forward_and_ladj(x))
