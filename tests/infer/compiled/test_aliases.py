"""Inputs of a compiled step that share memory: every pattern of aliases trains as it does under `pyro.infer.SVI`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_flows_ext.infer.compiled import CompiledSVI

X = torch.tensor([0.3, -0.2, 0.8, 1.4])
Y = torch.tensor([2.1, 1.7, 3.4, 2.5])


def guide(*args: Any, **kwargs: Any) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("z", dist.Normal(loc, 0.3))


def shifted(x: Tensor, y: Tensor) -> None:
    """y = x + z + noise: the posterior mean of z is near the mean of y - x."""
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)


def of_list(pair: list[Tensor]) -> None:
    shifted(*pair)


def of_dict(data: dict[str, Any]) -> None:
    shifted(data["x"], data["nested"][0])


def weighted(x: Tensor, w: Tensor, v: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", 4):
        with poutine.scale(scale=w):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        with poutine.scale(scale=v):
            pyro.sample("y", dist.Normal(z, 1.0), obs=x + 8)


def of_views(column: Tensor, row: Tensor) -> None:
    shifted(column[:, 0], row[0])


def closing_over() -> Callable[..., None]:
    data = X.clone()

    def model(y: Tensor) -> None:
        shifted(data, y)

    model.data = data  # type: ignore[attr-defined]
    return model


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", X.clone())

    def forward(self, y: Tensor) -> None:
        shifted(self.x, y)


class Case(NamedTuple):
    make: Callable[[], Any]
    phases: Callable[[Any], list[tuple[Any, ...]]]


def _switch(*phases: tuple[Any, ...]) -> Callable[[Any], list[tuple[Any, ...]]]:
    return lambda model: list(phases)


MEMORY = torch.arange(12.0) / 4
CASES = {
    "same-then-different": Case(lambda: shifted, _switch((X, X), (X, Y))),
    "different-then-same": Case(lambda: shifted, _switch((X, Y), (X, X), (Y, X))),
    "scalars": Case(
        lambda: weighted,
        _switch((X, *2 * (torch.tensor(1.0),)), (X, torch.tensor(1.0), torch.tensor(0.5))),
    ),
    "list": Case(lambda: of_list, _switch(([X, X],), ([X, Y],))),
    "dict": Case(
        lambda: of_dict, _switch(({"x": X, "nested": (X,)},), ({"x": X, "nested": (Y,)},))
    ),
    "keywords": Case(lambda: shifted, _switch((X, X), (Y, X))),
    "views-of-one-address": Case(
        lambda: of_views,
        _switch((X.view(4, 1), X.view(1, 4)), (X.view(4, 1), Y.view(1, 4))),
    ),
    "two-view-objects": Case(lambda: shifted, _switch((X.view(4), X.view(4)), (X, Y))),
    "overlap": Case(
        lambda: shifted, _switch((MEMORY[:4], MEMORY[2:6]), (MEMORY[:4], MEMORY[6:10]))
    ),
    "strides": Case(
        lambda: shifted, _switch((MEMORY[:4], MEMORY[:8:2]), (MEMORY[:4], MEMORY[4::2]))
    ),
    "expanded": Case(lambda: shifted, _switch((X[:1].expand(4), X), (X[:1].expand(4), Y))),
    "closed-over": Case(closing_over, lambda model: [(model.data,), (Y,)]),
    "closed-over-later": Case(closing_over, lambda model: [(Y,), (model.data,), (X,)]),
    "closed-over-view": Case(closing_over, lambda model: [(model.data.view(4),), (Y,)]),
    "buffer": Case(Buffered, lambda model: [(model.x,), (Y,)]),
}


def train(model: Any, phases: list[tuple[Any, ...]], steps: int, make: Any) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(model, guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(*args) for args in phases for _ in range(steps)]
    return torch.tensor(losses), pyro.param("loc").detach().clone(), svi


def compiled(*parts: Any) -> CompiledSVI:
    return CompiledSVI(*parts, backend="eager")


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_each_argument(name: str) -> None:
    case = CASES[name]
    results = []
    for make in (SVI, compiled):
        model = case.make()
        results.append(train(model, case.phases(model), 4, make))
    expected, ours = results
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-6)
    assert ours[2].fallback_reason is None


def test_a_switch_after_many_steps() -> None:
    """Long after the first comparisons with the handlers, and between two of them."""
    steps = 45
    expected = train(shifted, [(X, X), (X, Y)], steps, SVI)
    ours = train(shifted, [(X, X), (X, Y)], steps, compiled)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    assert ours[2].fallback_reason is None


def test_the_posterior_is_that_of_the_arguments_given() -> None:
    train(shifted, [(X, X), (X, Y)], 150, compiled)
    assert pyro.param("loc").item() == pytest.approx((Y - X).mean().item(), abs=0.15)


def test_each_pattern_of_aliases_has_one_graph() -> None:
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    svi = CompiledSVI(shifted, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), backend=backend)
    for _ in range(3):
        for args in ((X, X), (Y, Y.clone()), (X, Y)):
            svi.step(*args)
    assert len(graphs) == 2


def test_slices_of_closed_over_data_are_one_pattern() -> None:
    """The first mini-batch lies at the address of the data, and is no alias of them."""
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    def model(rows: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(X.mean(), 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=rows)

    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), backend=backend)
    for rows in (X[2:], X[:2], X[1:3]):
        svi.step(rows)
        svi.step(rows)
    assert len(graphs) == 1


def test_values_read_past_the_graph_are_those_of_the_argument() -> None:
    """`.data` makes a tensor that torch does not trace; two arguments that are one must not be confused by it."""

    def model(x: Tensor, y: Tensor) -> None:
        shifted(x.data, y.data)

    expected = train(model, [(X, X), (X, Y)], 5, SVI)
    ours = train(model, [(X, X), (X, Y)], 5, compiled)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    assert ours[2].fallback_reason is None


def test_a_program_that_asks_for_identity() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        shifted(x, y if x is not y else Y)

    expected = train(model, [(X, X), (X, X + 1)], 5, SVI)
    with pytest.warns(UserWarning, match="does not reproduce the program"):
        ours = train(model, [(X, X), (X, X + 1)], 5, compiled)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)


# --- memory that is written to ---


def test_arguments_written_in_place_are_read_again() -> None:
    results = []
    for make in (SVI, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(shifted, guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
        x, y = X.clone(), X.clone()
        losses = []
        for i in range(8):
            y[i % 4] += 1.0
            losses.append(svi.step(x, y))
        results.append(torch.tensor(losses))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_an_argument_in_the_memory_of_a_parameter_is_eager() -> None:
    """And other arguments are not."""
    weight = nn.Parameter(X.clone())

    def model(x: Tensor, y: Tensor) -> None:
        shifted(x, y + pyro.param("weight", weight))

    with torch.no_grad():
        view = weight.detach()
    expected = train(model, [(X, Y), (view, Y), (X, Y)], 4, SVI)
    with torch.no_grad():
        weight.copy_(X)
    with pytest.warns(UserWarning, match="an argument shares its memory with a parameter"):
        ours = train(model, [(X, Y), (view, Y), (X, Y)], 4, compiled)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)


def test_an_argument_that_requires_a_gradient_is_eager() -> None:
    x = X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="an argument requires a gradient"):
        train(shifted, [(x, Y)], 3, compiled)
    assert x.grad is not None
    expected = x.grad.clone()
    x.grad = None
    train(shifted, [(x, Y)], 3, SVI)
    torch.testing.assert_close(x.grad, expected)


def test_a_tensor_that_requires_a_gradient_and_is_no_parameter_is_eager() -> None:
    net = nn.Linear(4, 4)

    def model(x: Tensor, y: Tensor) -> None:
        shifted(net(x), y)

    with pytest.warns(UserWarning, match=r"requires a gradient and is no parameter"):
        train(model, [(X, Y)], 3, compiled)
    assert net.weight.grad is not None


def test_a_program_that_writes_into_an_argument() -> None:
    """Alone in its memory it compiles; beside an alias steps are eager."""

    def model(x: Tensor, counts: Tensor) -> None:
        counts.add_(1.0)
        shifted(x, counts)

    results = []
    for make in (SVI, compiled):
        counts, alone = X.clone(), X.clone()
        if make is compiled:
            with pytest.warns(UserWarning, match="writes into an argument that shares its memory"):
                losses, _, _ = train(model, [(alone.clone(), alone), (counts, counts)], 4, make)
        else:
            losses, _, _ = train(model, [(alone.clone(), alone), (counts, counts)], 4, make)
        results.append((losses, counts, alone))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


# --- tensors that no graph takes ---


def _quantized() -> Tensor:
    return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


TENSORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "coo": (lambda: X.to_sparse(), "sparse_coo"),
    "csr": (lambda: X.view(2, 2).to_sparse_csr(), "sparse_csr"),
    "mkldnn": (lambda: X.to_mkldnn(), "_mkldnn"),
    "quantized": (_quantized, "quantized"),
    "nested": (lambda: torch.nested.nested_tensor([X, X[:2]]), "nested"),
    "negated": (lambda: torch.complex(X, X).conj().imag, "lazily negated"),
    "conjugated": (lambda: torch.complex(X, X).conj(), "lazily negated or conjugated"),
    "subclass": (lambda: X.as_subclass(Tagged), "class Tagged"),
}


class Tagged(Tensor):
    pass


def _dense(x: Tensor) -> Tensor:
    """A function of any such tensor that is dense."""
    if x.is_nested:
        return torch.stack([part.sum() for part in x.unbind()]).sum().expand(4)
    x = x.dequantize() if x.is_quantized else x.to_dense() if x.layout is not torch.strided else x
    x = torch.view_as_real(x.resolve_conj()).sum(-1) if x.is_complex() else x
    return x.as_subclass(Tensor).reshape(4) + 0


PLACES = [(name, place) for name in TENSORS for place in ("argument", "closure")]
# An operation of a closed-over tensor with a class of its own is traced as that of a plain tensor.
PLACES.remove(("subclass", "closure"))


@pytest.mark.parametrize(("name", "place"), PLACES)
@pytest.mark.filterwarnings("ignore:.*(prototype|beta state|quantize):UserWarning")
def test_other_tensors_train_eagerly(name: str, place: str) -> None:
    make, reason = TENSORS[name]
    value = make()

    def given(x: Tensor) -> None:
        shifted(_dense(x), Y)

    def closed() -> None:
        shifted(_dense(value), Y)

    model, args = (given, (value,)) if place == "argument" else (closed, ())
    expected = train(model, [args], 3, SVI)
    with pytest.warns(UserWarning, match=reason):
        ours = train(model, [args], 3, compiled)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
