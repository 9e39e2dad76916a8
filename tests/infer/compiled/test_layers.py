"""Equal layers of a graph, computed at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as T
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flows_ext.guides import AutoNSF
from pyro_flows_ext.infer.compiled import CompiledSVI, repeats
from pyro_flows_ext.infer.compiled.arguments import Call
from pyro_flows_ext.infer.compiled.layers import Layers, merge_layers
from pyro_flows_ext.infer.compiled.repeats import find_repeats
from pyro_flows_ext.infer.compiled.tracing import trace_loss

DATA = torch.tensor([0.3, -0.2, 0.8, 1.4])


def model() -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(z.mean(-1, keepdim=True).exp(), 0.5), obs=DATA)


def stack_of(layer: Callable[..., Any], count: int = 6) -> Any:
    """A guide of equal layers, at perturbed parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormalizingFlow(model, partial(T.iterated, count, layer))
    guide()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return guide


def traced(guide: Any, particles: int = 1, of: Any = model) -> tuple[GraphModule, list[Tensor]]:
    """The graph of a loss and its gradient, and its inputs."""
    elbo = Trace_ELBO(particles, max_plate_nesting=1, vectorize_particles=particles > 1)
    params = list(guide.parameters())
    graph = trace_loss(Call(elbo, of, guide, (), {}), params, [], None)
    return graph.graph, [p.detach() for p in params] + graph.others


def outputs(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    pyro.set_rng_seed(3)
    with torch.no_grad():
        return list(function(*inputs))


def size_of(function: Any, inputs: list[Tensor]) -> int:
    """How many operations a function is."""
    with torch.no_grad():
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs).graph
    graph.eliminate_dead_code()
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("layer", [T.planar, T.radial])
def test_layers_are_the_graph(
    layer: Callable[..., Any], particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "MOST_WAITING", 1 / 3)
    graph, inputs = traced(stack_of(layer), particles)
    layers = Layers(graph)
    assert len(layers.repeats) >= 1
    for new, old in zip(outputs(layers, inputs), outputs(graph, inputs), strict=True):
        assert old.abs().max() > 0
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_layers_and_their_gradients_are_found() -> None:
    """Planar: of the 6 layers all forwards, and backwards all but the last, whose input needs no gradient."""
    graph, _ = traced(stack_of(T.planar))
    forward, backward = find_repeats(graph)
    assert [len(forward.rows), len(backward.rows)] == [6, 5]
    assert len(forward.chain) < len(forward.sources) / 4
    assert len(backward.chain) < len(backward.sources) / 4


@pytest.mark.slow
def test_operations_hardly_grow_with_layers() -> None:
    sizes = {}
    for count in (4, 12):
        graph, inputs = traced(stack_of(T.planar, count))
        sizes[count] = size_of(graph, inputs), size_of(Layers(graph), inputs)
    (flat_4, merged_4), (flat_12, merged_12) = sizes[4], sizes[12]
    assert merged_12 - merged_4 < (flat_12 - flat_4) / 3


@pytest.mark.slow
def test_layers_that_wait_for_one_another_stay_as_they_are() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNSF(model)
    guide()
    graph, inputs = traced(guide)
    layers = Layers(graph)
    assert not layers.repeats
    for new, old in zip(outputs(layers, inputs), outputs(graph, inputs), strict=True):
        assert torch.equal(new, old)


@pytest.mark.parametrize(("size", "expected"), [(64, 1), (8192, 0)])
def test_large_tensors_are_not_stacked(size: int, expected: int) -> None:
    def run(x: Tensor, parameters: Tensor) -> list[Tensor]:
        kept = []
        for w in parameters.unbind():
            w = (w.exp() + 1).log().tanh().sin().exp().cos().sqrt().sin()
            x = x + w * x.tanh()
            kept.append((x * w).exp().sin().sum() * w.cos().sum().exp())
        return [x, torch.stack(kept)]

    graph = make_fx(run, tracing_mode="fake")(torch.randn(size), torch.randn(5, size))
    assert len(find_repeats(graph)) == expected


def test_draws_keep_their_order() -> None:
    """Steps in time with a draw each, and one of other shape between them."""
    coefficients = torch.nn.Parameter(0.1 * torch.randn(8, 3))

    def run(x: Tensor, coefficients: Tensor) -> list[Tensor]:
        losses = []
        for c in coefficients.unbind():
            noise, other = torch.randn(3), torch.rand(2)
            scale = (c.exp() + c.cos() + other.sum()).log().tanh() * c.sin().exp()
            x = x * scale + noise
            losses.append((x.exp().log1p().sin() - noise.cos() * scale).sum())
        return [x, torch.stack(losses)]

    inputs = [torch.randn(3), coefficients.detach()]
    graph = make_fx(run)(*inputs)
    layers = Layers(graph)
    [repeat] = layers.repeats
    assert len(repeat.rows) == 8
    for new, old in zip(outputs(layers, inputs), outputs(graph, inputs), strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("break_at", [0, 2, 4, 7])
def test_a_layer_that_differs(break_at: int) -> None:
    """One layer reads another tensor, or the layer before the last one: the others are merged, the numbers stay."""
    parameters = torch.randn(8, 3)

    def run(x: Tensor, parameters: Tensor) -> list[Tensor]:
        rows, before, kept = parameters.unbind(), x, []
        for k, w in enumerate(rows):
            source = before if k == break_at else x
            w = (w.exp() + 1).log().tanh().sin().exp().cos() * rows[0 if k == break_at else k]
            before, x = x, source + w * x.tanh()
            kept.append((x * w).exp().sin().sum() * w.cos().sum().exp())
        return [x, torch.stack(kept)]

    inputs = [torch.randn(3), parameters]
    graph = make_fx(run)(*inputs)
    for new, old in zip(outputs(Layers(graph), inputs), outputs(graph, inputs), strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.slow
def test_compiled_steps_of_merged_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a seed, the losses of `pyro.infer.SVI`."""
    made = []

    def interpreted(graph: GraphModule, example: list[Tensor]) -> Any:
        made.append(graph)
        return graph

    losses: list[list[float]] = []
    for kind in (SVI, partial(CompiledSVI, backend=interpreted)):
        guide = stack_of(T.planar, 8)
        pyro.set_rng_seed(1)
        svi: Any = kind(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses.append([svi.step() for _ in range(12)])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)
    assert len(made) == 1


def test_what_has_no_batched_form_stays_as_it_is() -> None:
    """Steps that `torch.vmap` refuses: their results have sizes that depend on values."""
    parameters = torch.rand(6, 3) + 1

    def run(x: Tensor, parameters: Tensor) -> list[Tensor]:
        kept = []
        for w in parameters.unbind():
            kept.append(
                torch.ops.aten.nonzero.default((w.exp() + 1).log().tanh().sin()).sum() * x.sum()
            )
            kept[-1] = kept[-1] + ((w * 2).exp().cos().sin().tanh() * x).sum().exp().log1p()
            x = x.tanh()
        return [x, torch.stack(kept)]

    inputs = [torch.randn(3), parameters]
    graph = make_fx(run)(*inputs)
    assert Layers(graph).repeats
    assert merge_layers(graph, inputs) is graph
