"""Operations with a gradient of their own, against the chains of operations that they replace."""

import itertools

import pytest
import torch
from fake_device import DEVICE, FakeDevice, OnDevice
from torch import nn

from pyro_flows_ext.nn import MADE, MLP, ResidualMLP
from pyro_flows_ext.ops import fused, fused_splines, rq_spline
from pyro_flows_ext.ops.perceptron import RELU, SIGMOID, TANH, perceptron
from pyro_flows_ext.testing import POINTS
from pyro_flows_ext.transforms import Autoregressive, Coupling, RationalQuadratic, nsf
from pyro_flows_ext.transforms.transformers import Affine


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Fuses small operations too."""
    monkeypatch.setattr(fused, "MIN_NUMEL", 0)
    torch.manual_seed(0)


def network(activation, widths=(4, 6, 6, 3), dtype=torch.float64):
    weights = [torch.randn(o, i, dtype=dtype) for i, o in itertools.pairwise(widths)]
    return weights, [torch.randn(len(w), dtype=dtype) for w in weights], activation


def spline(inverse):
    return lambda x, raw: rq_spline(x, raw.mT, bound=2.0, inverse=inverse)


def affine(direction):
    return getattr(Affine(), direction)


def of_network(residual, activation, batch_bias=False, rows=5):
    weights, biases, activation = network(activation)
    x = torch.randn(rows, 4, dtype=torch.float64)
    if batch_bias:
        biases[0] = torch.randn(rows, 6, dtype=torch.float64)

    def run(x, *tensors):
        return perceptron(x, tensors[:3], tensors[3:], activation, residual=residual)

    return run, (x, *weights, *biases)


def cases(rows=5, dim=3):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x, batch = 2 * draw(rows, dim), 2 * draw(2, rows, dim)
    return {
        "spline": (spline(False), (x, draw(rows, 11, dim))),
        "spline inverse": (spline(True), (x, draw(rows, 11, dim))),
        "spline of one bin": (spline(False), (x, draw(rows, 2, dim))),
        "spline of a batch of batches": (spline(True), (batch, draw(2, rows, 8, dim))),
        "affine": (affine("forward"), (x, draw(rows, 2, dim))),
        "affine inverse": (affine("inverse"), (x, draw(rows, 2, dim))),
        "relu": of_network(False, RELU, rows=rows),
        "tanh, residual": of_network(True, TANH, rows=rows),
        "sigmoid, a bias by row": of_network(True, SIGMOID, batch_bias=True, rows=rows),
    }


def as_leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("name", list(cases()))
class TestFused:
    def test_values_and_gradients(self, name, monkeypatch):
        run, tensors = cases()[name]
        found, expected = as_leaves(tensors), as_leaves(tensors)
        outputs = run(*found)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(
            "Fused" in n or "Affine" in n or "Perceptron" in n or "View" in n
            for n in map(_name, outputs)
        )
        with monkeypatch.context() as patch:
            patch.setattr(fused, "may_fuse", lambda *_: False)
            patch.setattr("pyro_flows_ext.ops.perceptron.may_fuse", lambda *_: False)
            others = run(*expected)
        others = others if isinstance(others, tuple) else (others,)
        cotangents = [torch.randn_like(o) for o in outputs]
        torch.testing.assert_close(outputs, others, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            torch.autograd.grad(outputs, found, cotangents),
            torch.autograd.grad(others, expected, cotangents),
            rtol=1e-9,
            atol=1e-9,
        )
        with torch.no_grad():
            torch.testing.assert_close(run(*tensors), _unwrapped(outputs), rtol=0, atol=1e-12)

    def test_gradients(self, name):
        run, tensors = cases()[name]
        assert torch.autograd.gradcheck(run, as_leaves(tensors), check_batched_grad=True)

    def test_second_derivatives(self, name):
        run, tensors = cases(rows=3, dim=2)[name]  # the time grows with the square of the size
        assert torch.autograd.gradgradcheck(run, as_leaves(tensors))

    def test_one_cotangent_is_enough(self, name):
        run, tensors = cases()[name]
        leaves = as_leaves(tensors)
        outputs = run(*leaves)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            grads = torch.autograd.grad(output.sum(), leaves, retain_graph=True, allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in grads)

    def test_frozen_arguments_get_no_gradient(self, name):
        run, tensors = cases()[name]
        leaves = as_leaves(tensors)
        leaves[-1].requires_grad_(False)
        outputs = run(*leaves)
        total = sum(o.sum() for o in outputs) if isinstance(outputs, tuple) else outputs.sum()
        total.backward()
        assert leaves[-1].grad is None
        assert leaves[0].grad is not None

    def test_function_transforms_and_forward_mode(self, name):
        run, tensors = cases()[name]
        tangents = [torch.randn_like(t) for t in tensors]
        value, tangent = torch.func.jvp(run, tuple(tensors), tuple(tangents))
        torch.testing.assert_close(value, run(*tensors))
        with torch.autograd.forward_ad.dual_level():
            duals = map(torch.autograd.forward_ad.make_dual, tensors, tangents)
            dual = run(*duals)
            first = dual[0] if isinstance(dual, tuple) else dual
            found = torch.autograd.forward_ad.unpack_dual(first).tangent
        torch.testing.assert_close(found, tangent[0] if isinstance(tangent, tuple) else tangent)


def _name(output):
    return output.grad_fn.name()


def _unwrapped(outputs):
    return tuple(o.detach() for o in outputs) if len(outputs) > 1 else outputs[0].detach()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_spline_in_several_blocks(rows, inverse, monkeypatch):
    x, raw = 3 * torch.randn(rows, 4).double(), torch.randn(rows, 4, 23).double()
    leaves, others = as_leaves((x, raw)), as_leaves((x, raw))
    whole = rq_spline(*leaves, bound=5.0, inverse=inverse)
    expected = torch.autograd.grad(sum(o.sum() for o in whole), leaves)
    monkeypatch.setattr("pyro_flows_ext.ops.fused_splines.BLOCK", 16)
    blocks = rq_spline(*others, bound=5.0, inverse=inverse)
    torch.testing.assert_close(blocks, whole)
    found = torch.autograd.grad(sum(o.sum() for o in blocks), others)
    torch.testing.assert_close(found, expected)


def test_modules_fuse_only_what_they_know():
    x = torch.randn(6, 3, requires_grad=True)
    assert "Perceptron" in _name(MLP(3, 2, (4,))(x))
    assert "Perceptron" in _name(ResidualMLP(3, 2, (4, 4))(x))
    assert "Perceptron" not in _name(MLP(3, 2, (4,), activation=nn.SiLU)(x))
    hooked = MLP(3, 2, (4,))
    seen = []
    hooked[1].register_forward_hook(lambda *_: seen.append(1))
    hooked(x)
    assert seen == [1]
    net = MADE(3, 2, (4, 4))
    net.activation.register_forward_hook(lambda *_: seen.append(2))
    net(x)
    assert seen == [1, 2, 2]


def test_autocast_runs_the_chain():
    net, x = MLP(3, 2, (4,)), torch.randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype == torch.bfloat16


ENTRIES = {
    "coupling": lambda D: Coupling(D, (4,)),
    "spline coupling": lambda D: Coupling(
        D, (4,), transformer=RationalQuadratic(4), mask="alternating"
    ),
    "autoregressive": lambda D: Autoregressive(D, (8, 8)),
    "nsf": lambda D: nsf(D, num_layers=2, hidden_dims=(4,), kind="autoregressive"),
}


@pytest.mark.parametrize("number", [n for n in POINTS if n not in (13, 14, 15)])
@pytest.mark.parametrize("name", ENTRIES)
def test_contract(name, number):
    options = {"scale": 0.3} if name == "nsf" else {}
    POINTS[number].check(lambda: ENTRIES[name](3), dtype=torch.float64, **options)


@pytest.mark.parametrize("inverse", [False, True])
def test_splines_on_another_device(inverse):
    x, raw = 3 * torch.randn(20, 4).double(), torch.randn(20, 4, 11).double()
    by_y, by_ladj = torch.randn(2, 80).double()

    def passes(x, raw, by_y, by_ladj):
        spline = fused_splines.Spline(4, 2.0, inverse, x)
        y, ladj, found, *blocks = fused_splines._run(spline, x, raw)
        by_x, by = spline.gradient(found, by_y, by_ladj)
        out = torch.zeros_like(blocks[0])
        spline.spread(blocks[0], found, by, out)
        return y, ladj, by_x, out[:-1]

    expected = passes(x, raw, by_y, by_ladj)
    with FakeDevice():
        there = passes(*(t.to(DEVICE) for t in (x, raw, by_y, by_ladj)))
        assert all(isinstance(t, OnDevice) for t in there)
        found = [t.cpu() for t in there]
    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-12)
