"""Affine layers with their networks as one operation: equal to ordinary operations in value and gradients."""

import pytest
import torch
from autoregressive_layers import perturb

from pyro_flows_ext.ops import fused
from pyro_flows_ext.transforms import Autoregressive, Coupling, autoregressive, coupling

LAYERS = {
    "half": lambda: Coupling(5, (7, 7)),
    "flipped": lambda: Coupling(5, (7,), flip=True, activation=torch.nn.Tanh),
    "linear-maf": lambda: Autoregressive(4, ()),
    "maf": lambda: Autoregressive(5, (8, 8), order=[2, 0, 4, 1, 3], activation=torch.nn.ReLU),
    "residual-maf": lambda: Autoregressive(4, (8, 8, 8)),
    "context-maf": lambda: Autoregressive(4, (8, 8), context_dim=2),
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
    for module in (coupling, autoregressive):
        run = module.affine_layer

        def count(*args, run=run, **options):
            found = run(*args, **options)
            calls.append(found is not None)
            return found

        monkeypatch.setattr(module, "affine_layer", count)
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
