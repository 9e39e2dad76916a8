"""Optimizers in the graph: the numbers of the eager ones, on the state of the eager ones."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim

from pyro_flows_ext.infer.compiled import CompiledSVI
from pyro_flows_ext.infer.compiled.updates import Owner, Updates, owner_of

STEPS = 12
SHAPES = ((), (3,), (2, 4))


def grad_of(step: int, i: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + i)
    return torch.randn(SHAPES[i], generator=generator, dtype=torch.float64) * 10 ** (step % 3 - 1)


OPTIMIZERS: dict[str, Callable[[], PyroOptim]] = {
    name: functools.partial(getattr(pyro.optim, name.split("-")[0]), options)
    for name, options in {
        "Adam": {"lr": 0.1},
        "Adam-decay": {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3},
        "Adam-amsgrad": {"lr": 0.1, "amsgrad": True, "maximize": True},
        "AdamW": {"lr": 0.1, "weight_decay": 0.2},
        "ClippedAdam": {"lr": 0.1, "clip_norm": 0.5, "lrd": 0.9, "weight_decay": 0.1},
        "ClippedAdam-centered": {"lr": 0.1, "centered_variance": True},
        "SGD": {"lr": 0.1, "weight_decay": 0.2},
        "SGD-momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True},
        "SGD-nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2},
        "Adamax": {"lr": 0.1, "weight_decay": 0.2},
    }.items()
} | {
    "clip-norm": lambda: pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 0.7}),
    "clip-value": lambda: pyro.optim.SGD({"lr": 0.1}, {"clip_value": 0.7}),
    "by-parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "p1" else 0.01}),
}


def start(optim: PyroOptim) -> list[torch.Tensor]:
    """Parameters after one eager step, which makes the states."""
    for i, shape in enumerate(SHAPES):
        pyro.param(f"p{i}", torch.full(shape, 0.5, dtype=torch.float64))
    params = [pyro.param(f"p{i}").unconstrained() for i in range(len(SHAPES))]
    eager_step(optim, params, 0)
    return params


def eager_step(optim: PyroOptim, params: list[torch.Tensor], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = grad_of(step, i)
    optim(params)


def step_in_graph(
    updates: Updates,
    losses: list[torch.Tensor],
    grads: list[list[torch.Tensor]],
    packed: bool = False,
) -> torch.Tensor:
    """What a graph of as many steps as there are losses does, eagerly; the losses that it gives."""
    numbers, given = torch.tensor(updates.numbers(len(losses)), dtype=torch.float64), []
    blocks = updates.blocks(packed)
    with torch.no_grad():
        values = updates.by_param(updates.params, updates.tensors)
        moving = [block.pack(values) for block in blocks]
        for loss, some, row in zip(losses, grads, numbers, strict=True):
            loss, moving = updates.apply(blocks, loss, some, moving, row)
            given.append(loss)
        updates.write(blocks, moving, values)
    return torch.stack(given)


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_numbers_given_the_same_gradients(name: str, size: int, packed: bool) -> None:
    results = []
    for compiled in (False, True):
        pyro.clear_param_store()
        optim = OPTIMIZERS[name]()
        params = start(optim)
        if compiled:
            updates = Updates(params, [owner_of(optim, p) for p in params])
            for step in range(1, STEPS + 1, size):
                assert updates.is_current(others_stepped=step == 4)
                grads = [[grad_of(step + k, i) for i in range(len(params))] for k in range(size)]
                step_in_graph(updates, [torch.tensor(0.0)] * size, grads, packed)
                updates.taken(size)
        else:
            for step in range(1, STEPS + 1):
                eager_step(optim, params, step)
        # More eager steps go on from the state, counts and rates included.
        eager_step(optim, params, STEPS + 1)
        results.append((optim.get_state(), [p.detach().clone() for p in params]))
    (state, values), (our_state, our_values) = results
    torch.testing.assert_close(our_values, values, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(values[1], torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(our_state, state, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_joint_clipping_and_steps_that_are_not_finite(packed: bool) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.Adam([p, q], lr=0.1)
    owners = [Owner(optimizer, optimizer.param_groups[0])] * 2
    expected = torch.optim.Adam(
        [x := torch.nn.Parameter(p.detach().clone()), y := torch.nn.Parameter(q.detach().clone())],
        lr=0.1,
    )
    for step in range(4):
        grads = [grad_of(step, 1), 3 * grad_of(step, 1)]
        x.grad, y.grad = (g.clone() for g in grads)
        torch.nn.utils.clip_grad_norm_([x, y], 0.8)
        expected.step()
        if step == 0:
            p.grad, q.grad = x.grad.clone(), y.grad.clone()
            optimizer.step()
            updates = Updates([p, q], owners, joint_clip=0.8)
            continue
        for loss, bad in ((torch.nan, grads), (0.0, [grads[0], grads[1] * torch.inf])):
            before = p.detach().clone()
            [given] = step_in_graph(updates, [torch.tensor(loss)], [bad], packed)
            assert given.isnan()
            assert torch.equal(p, before)
        step_in_graph(updates, [torch.tensor(0.0)], [grads], packed)
        updates.taken(1)
    torch.testing.assert_close([p, q], [x, y], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(optimizer.state_dict(), expected.state_dict(), rtol=1e-9, atol=1e-12)


# --- with a model ---


def model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def guide() -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


def train(make: Any, optim: PyroOptim, steps: int = 9, schedule: int = 0) -> tuple[Any, Any, Any]:
    svi = make(model, guide, optim, Trace_ELBO())
    losses = []
    for step in range(steps):
        losses.append(svi.step())
        if schedule and step % schedule == 0:
            optim.step()
    return (
        losses,
        optim.get_state(),
        {n: p.detach().clone() for n, p in pyro.get_param_store().items()},
    )


compiled = functools.partial(CompiledSVI, backend="eager")
SCHEDULES = {
    "ExponentialLR": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.7}
    ),
    "StepLR-SGD": lambda: pyro.optim.StepLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "step_size": 2}
    ),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.8}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_that_change(name: str) -> None:
    results = []
    for make in (SVI, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        results.append(train(make, SCHEDULES[name](), schedule=0 if name == "ClippedAdam" else 2))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_state_is_saved_and_loaded() -> None:
    """Six steps, saved, and six more by another object are twelve."""
    results = []
    for parts in ([12], [6, 6]):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        state, losses = {}, []
        for steps in parts:
            optim = pyro.optim.Adam({"lr": 0.1})
            optim.set_state(state)
            part, state, params = train(compiled, optim, steps)
            losses += part
        results.append((losses, state, params))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_a_new_rate_by_hand_is_seen() -> None:
    optim = pyro.optim.SGD({"lr": 0.1})
    svi = compiled(model, guide, optim, Trace_ELBO())
    for _ in range(3):
        svi.step()
    for torch_optim, lr in zip(optim.optim_objs.values(), itertools.repeat(0.0)):
        torch_optim.param_groups[0]["lr"] = lr
    before = pyro.param("loc").item()
    svi.step()
    assert pyro.param("loc").item() == before
    assert svi.fallback_reason is None


def test_others_are_refused() -> None:
    svi = compiled(model, guide, pyro.optim.RMSprop({"lr": 0.1}), Trace_ELBO())
    with pytest.warns(UserWarning, match="RMSprop is not among the optimizers that compile"):
        svi.run(3)
