"""State beside the arguments that changes between two steps: each step trains as it does under `pyro.infer.SVI`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_flows_ext.infer.compiled import CompiledSVI
from pyro_flows_ext.infer.compiled.guards import StateGuard

X = torch.tensor([0.3, -0.2, 0.8, 1.4])
SCALE = 1.0
SETTINGS = {"scale": 1.0}

Program = Callable[..., None]
# A model, its arguments, and the changes to make one after the other.
Parts = tuple[Any, Callable[[], tuple[Any, ...]], list[Callable[[], None]]]


def guide(*args: Any, **kwargs: Any) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.3))


def observe(scale: Any, x: Tensor = X) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def nothing() -> tuple[Any, ...]:
    return ()


class Settings:
    """A plain object, with an attribute of its class and one of its own."""

    base = 1.0

    def __init__(self) -> None:
        self.extra = 0.5
        self.x = X

    def scale(self) -> float:
        return self.base + self.extra


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(4))
        self.linear = nn.Linear(4, 4)
        self.linear.requires_grad_(False)
        self.dropout = nn.Dropout(0.5)
        self.width = 1.0

    def forward(self) -> None:
        observe(self.width, self.dropout(self.linear(X)) + self.offset)


class Trained(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](4, 4)

    def forward(self) -> None:
        observe(1.0, self.linear(X))


def assign(target: Any, **values: Any) -> Callable[[], None]:
    return lambda: [setattr(target, name, value) for name, value in values.items()] and None


def global_number() -> Parts:
    def change() -> None:
        global SCALE
        SCALE = 2.0

    def restore() -> None:
        global SCALE
        SCALE = 1.0

    return (lambda: observe(SCALE)), nothing, [change, restore]


def global_dict() -> Parts:
    return (
        (lambda: observe(SETTINGS["scale"])),
        nothing,
        [lambda: SETTINGS.update(scale=2.0), lambda: SETTINGS.update(scale=1.0)],
    )


def closure_number() -> Parts:
    scale = 1.0

    def model() -> None:
        observe(scale)

    def change() -> None:
        nonlocal scale
        scale = 2.0

    return model, nothing, [change]


def closure_list() -> Parts:
    scales = [1.0, 0.5]
    return (
        (lambda: observe(sum(scales))),
        nothing,
        [lambda: scales.append(1.0), lambda: scales.__setitem__(0, 3.0)],
    )


def closure_tensor() -> Parts:
    """Another tensor in the place of the one that was closed over."""
    x = X

    def model() -> None:
        observe(1.0, x)

    def change() -> None:
        nonlocal x
        x = X + 2.0

    def resize() -> None:
        nonlocal x
        x = torch.ones(7)

    return model, nothing, [change, resize]


def helper_function() -> Parts:
    state = {"scale": 1.0}

    def helper() -> float:
        return state["scale"]

    return (lambda: observe(helper())), nothing, [lambda: state.update(scale=2.0)]


def default_argument() -> Parts:
    settings = Settings()

    def model(settings: Settings = settings) -> None:
        observe(settings.scale())

    return model, nothing, [assign(settings, extra=2.0), assign(settings, base=3.0)]


def class_attribute() -> Parts:
    settings = Settings()

    def restore() -> None:
        Settings.base = 1.0

    return (
        (lambda: observe(settings.scale())),
        nothing,
        [assign(Settings, base=2.0), restore],
    )


def object_argument() -> Parts:
    settings = Settings()
    return (
        (lambda settings: observe(settings.scale(), settings.x)),
        lambda: (settings,),
        [assign(settings, extra=2.0), assign(settings, x=X + 1.0)],
    )


def number_argument() -> Parts:
    """Positive zero equals negative zero, and is another number."""
    now = [0.0]

    def model(offset: float) -> None:
        observe(1.5 + math.copysign(0.5, offset))

    return model, lambda: (now[0],), [lambda: now.__setitem__(0, -0.0)]


def dict_order() -> Parts:
    now = [{"a": X, "b": X + 1.0}]

    def model(data: dict[str, Tensor]) -> None:
        first, second = data.values()
        observe(1.0, first - 2 * second)

    return model, lambda: (now[0],), [lambda: now.__setitem__(0, {"b": X + 1.0, "a": X})]


def buffer_rebound() -> Parts:
    net = Net().eval()
    return net, nothing, [assign(net, offset=torch.ones(4))]


def buffer_of_data() -> Parts:
    """The same tensor, over other memory."""
    net = Net().eval()
    return net, nothing, [lambda: setattr(net.offset, "data", torch.ones(4))]


def module_attribute() -> Parts:
    net = Net().eval()
    return net, nothing, [assign(net, width=2.0)]


def module_replaced() -> Parts:
    net = Net().eval()
    other = nn.Linear(4, 4).requires_grad_(False)
    return net, nothing, [assign(net, linear=other)]


def state_dict_assigned() -> Parts:
    net = Net().eval()
    state = {k: v + 0.3 for k, v in net.state_dict().items()}
    return net, nothing, [lambda: net.load_state_dict(state, assign=True)]


def mode() -> Parts:
    net = Net().eval()
    return net, nothing, [net.train, net.eval]


def hook() -> Parts:
    net = Net().eval()
    return (
        net,
        nothing,
        [lambda: net.linear.register_forward_hook(lambda module, args, output: 2 * output)],
    )


def parameter_replaced() -> Parts:
    net = Trained()

    def change() -> None:
        store = pyro.get_param_store()
        name = next(n for n in store if "weight" in n)
        del store[name]
        net.linear.weight = nn.Parameter(torch.eye(4))

    return net, nothing, [change]


def parameters_assigned() -> Parts:
    net = Trained()
    state = {k: v + 0.3 for k, v in net.state_dict().items()}
    return net, nothing, [lambda: net.load_state_dict(state, assign=True)]


def handler() -> Parts:
    """A handler around the model, whose data are changed."""
    data = {"x": X}
    model = poutine.condition(
        lambda: pyro.sample(
            "x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 10.0)), 1.0).expand([4]).to_event(1)
        ),
        data=data,
    )
    return model, nothing, [lambda: data.update(x=X + 2.0)]


def array() -> Parts:
    scale = np.array([1.0, 1.0])
    return (
        (lambda: observe(float(scale.sum()))),
        nothing,
        [lambda: scale.__setitem__(0, 2.0)],
    )


def default_dtype() -> Parts:
    return (
        (lambda: observe(torch.ones(()), X.to(torch.get_default_dtype()))),
        nothing,
        [
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
        ],
    )


KINDS = (
    *(global_number, global_dict, closure_number, closure_list, closure_tensor, helper_function),
    *(default_argument, class_attribute, object_argument, number_argument, dict_order),
    *(buffer_rebound, buffer_of_data, module_attribute, module_replaced, state_dict_assigned),
    *(mode, hook, parameter_replaced, parameters_assigned, handler, array, default_dtype),
)


def train(parts: Parts, make: Any, steps: int = 4) -> Any:
    model, args, changes = parts
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(model, guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(*args()) for _ in range(steps)]
    for change in changes:
        change()
        losses += [svi.step(*args()) for _ in range(steps)]
    return torch.tensor(losses, dtype=torch.float64), svi


def compiled(*parts: Any, **options: Any) -> CompiledSVI:
    return CompiledSVI(*parts, **{"backend": "eager"} | options)


@pytest.mark.parametrize("make", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_a_change_is_followed(make: Callable[[], Parts]) -> None:
    results = []
    for svi in (SVI, compiled):
        torch.manual_seed(1)
        results.append(train(make(), svi))
    (expected, _), (ours, svi) = results
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert svi.fallback_reason is None
    assert not torch.allclose(expected[:4], expected[4:8], atol=0.3)  # the change is one


def test_a_state_that_returns_has_its_graph() -> None:
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    net = Net().eval()
    changes = [net.train, net.eval, net.train, net.eval]
    train((net, nothing, changes), lambda *parts: compiled(*parts, backend=backend))
    assert len(graphs) == 2


def test_a_state_that_changes_at_every_step_is_eager() -> None:
    counter = itertools.count(1)
    now = [1.0]

    def model() -> None:
        observe(now[0])

    svi = compiled(model, guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())

    def train() -> None:
        for _ in range(30):
            now[0] = float(next(counter))
            svi.step()

    with pytest.warns(UserWarning, match="graphs were made"):
        train()


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast is enabled"),
        (lambda: poutine.scale(scale=0.5), "within a Pyro handler"),
        (torch.no_grad, "gradients are disabled"),
    ],
    ids=["autocast", "handler", "no-grad"],
)
def test_contexts_of_a_step_are_eager(context: Any, reason: str) -> None:
    def run(make: Any) -> Tensor:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(lambda: observe(1.0), guide, pyro.optim.SGD({"lr": 0.02}), Trace_ELBO())
        losses = [svi.step() for _ in range(3)]
        with context():
            losses += [svi.step() for _ in range(3)]
        losses += [svi.step() for _ in range(3)]
        return torch.tensor(losses)

    expected = run(SVI)
    with pytest.warns(UserWarning, match=reason):
        ours = run(compiled)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "clip", "change"),
    [
        ({"lr": 0.02}, None, {"momentum": 0.9}),
        ({"lr": 0.02, "momentum": 0.9}, None, {"momentum": 0.1}),
        ({"lr": 0.02}, None, {"weight_decay": 5.0}),
        ({"lr": 0.02}, {"clip_norm": 10.0}, {}),
    ],
    ids=["momentum-on", "momentum", "decay", "clip"],
)
def test_settings_of_the_optimizer_are_followed(options: Any, clip: Any, change: Any) -> None:
    results = []
    for make in (SVI, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        limits = None if clip is None else dict(clip)
        optim = pyro.optim.SGD(dict(options), limits)
        svi = make(lambda: observe(0.1), guide, optim, Trace_ELBO())
        losses = [svi.step() for _ in range(4)]
        for optimizer in optim.optim_objs.values():
            optimizer.param_groups[0].update(change)
        if limits is not None:
            limits["clip_norm"] = 0.01
        losses += [svi.step() for _ in range(6)]
        results.append(torch.tensor(losses))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_state_of_the_optimizer_that_was_cleared_is_followed() -> None:
    results = []
    for make in (SVI, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = pyro.optim.Adam({"lr": 0.1})
        svi = make(lambda: observe(0.1), guide, optim, Trace_ELBO())
        losses = [svi.step() for _ in range(4)]
        for optimizer in optim.optim_objs.values():
            optimizer.state.clear()
        losses += [svi.step() for _ in range(6)]
        results.append(torch.tensor(losses))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_particles_of_the_loss_are_followed() -> None:
    results = []
    for make in (SVI, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = Trace_ELBO(num_particles=1)
        svi = make(lambda: observe(1.0), guide, pyro.optim.SGD({"lr": 0.02}), loss)
        losses = [svi.step() for _ in range(4)]
        loss.num_particles = 3
        losses += [svi.step() for _ in range(4)]
        results.append(torch.tensor(losses))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


# --- the guard by itself ---


def test_a_guard_holds_while_nothing_changes() -> None:
    net = Net()
    guard = StateGuard([net, lambda: observe(SCALE)])
    assert guard.holds()
    net.width = float("1.0")  # an equal number
    assert guard.holds()
    net.width = -1.0
    assert not guard.holds()


def test_state_that_the_program_changes_is_left_out() -> None:
    calls: list[int] = []

    def model() -> None:
        calls.append(1)

    guard = StateGuard([model])
    model()
    assert not guard.holds()
    guard.settle()
    assert guard.holds()
    model()
    assert guard.holds()


def test_cycles_end() -> None:
    loop: list[Any] = [1.0]
    loop.append(loop)
    guard = StateGuard([loop])
    assert guard.holds()
    loop[0] = 2.0
    assert not guard.holds()
