"""Update rules of optimizers as pure functions of parameter, gradient, state and numbers that change by step.

Each is the formula of its namesake in `torch.optim` or `pyro.optim`, in the same order of operations. Numbers that
depend on the learning rate or the count of steps are inputs, computed on the host in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam as PyroClippedAdam
from torch import Tensor

from .._adam import Adam as LightAdam
from .unsupported import UnsupportedForCompilation

Group = Mapping[str, Any]
State = dict[str, Tensor]


class Rule:
    """The update of one class of optimizers. `group`: its settings; `t`: the number of the step, from 1."""

    # Settings that are constants of a graph: a change of them makes a new graph.
    settings: tuple[str, ...] = ()

    def states(self, group: Group) -> tuple[str, ...]:
        """The names of the state tensors of a parameter."""
        return ()

    def numbers(self, group: Group, lr: float, t: int) -> tuple[float, ...]:
        """The inputs that change from step to step."""
        return (lr,)

    def rate_after(self, group: Group, lr: float) -> float:
        """The learning rate of a step, given that of the step before."""
        return lr

    def update(
        self, p: Tensor, g: Tensor, state: State, c: Sequence[Tensor], group: Group
    ) -> tuple[Tensor, State]:
        """The parameter and the state after a step with the gradient g and the numbers c."""
        raise TypeError(f"{type(self).__name__} must define update")


class SGD(Rule):
    """p - lr g, with momentum, Nesterov's too, and weight decay."""

    settings = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")

    def states(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def update(
        self, p: Tensor, g: Tensor, state: State, c: Sequence[Tensor], group: Group
    ) -> tuple[Tensor, State]:
        g = _decayed(-g if group["maximize"] else g, p, group)
        momentum = group["momentum"]
        if momentum:
            buffer = momentum * state["momentum_buffer"] + (1 - group["dampening"]) * g
            g = g + momentum * buffer if group["nesterov"] else buffer
            state = {"momentum_buffer": buffer}
        return p - c[0] * g, state


class Adam(Rule):
    """p - lr m̂ / (√v̂ + ε), with AMSGrad and weight decay, which `decoupled` takes from the parameter as AdamW does."""

    settings = ("betas", "eps", "weight_decay", "amsgrad", "maximize")

    def __init__(self, decoupled: bool = False):
        self.decoupled = decoupled

    def states(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ())

    def numbers(self, group: Group, lr: float, t: int) -> tuple[float, ...]:
        beta1, beta2 = map(float, group["betas"])
        return lr, lr / (1 - beta1**t), math.sqrt(1 - beta2**t)

    def update(
        self, p: Tensor, g: Tensor, state: State, c: Sequence[Tensor], group: Group
    ) -> tuple[Tensor, State]:
        lr, step_size, correction = c
        beta1, beta2 = map(float, group["betas"])
        g = -g if group["maximize"] else g
        if group["weight_decay"] and self.decoupled:
            p = p * (1 - lr * group["weight_decay"])
        else:
            g = _decayed(g, p, group)
        m = state["exp_avg"].lerp(g, 1 - beta1)
        v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
        after, second = {"exp_avg": m, "exp_avg_sq": v}, v
        if group["amsgrad"]:
            second = after["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        return p - step_size * (m / (second.sqrt() / correction + group["eps"])), after


class ClippedAdam(Rule):
    """Pyro's: gradients clipped by element, the rate falling by `lrd` at every step."""

    settings = ("betas", "eps", "weight_decay", "clip_norm", "lrd", "centered_variance")

    def states(self, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def rate_after(self, group: Group, lr: float) -> float:
        return lr * group["lrd"]

    def numbers(self, group: Group, lr: float, t: int) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return (lr * math.sqrt(1 - beta2**t) / (1 - beta1**t),)

    def update(
        self, p: Tensor, g: Tensor, state: State, c: Sequence[Tensor], group: Group
    ) -> tuple[Tensor, State]:
        beta1, beta2 = group["betas"]
        g = _decayed(g.clamp(-group["clip_norm"], group["clip_norm"]), p, group)
        m = beta1 * state["exp_avg"] + (1 - beta1) * g
        spread = g - m if group["centered_variance"] else g
        v = beta2 * state["exp_avg_sq"] + (1 - beta2) * spread * spread
        return p - c[0] * (m / (v.sqrt() + group["eps"])), {"exp_avg": m, "exp_avg_sq": v}


class Adagrad(Rule):
    """p - lr g / (√Σ g² + ε), the rate falling by `lr_decay`."""

    settings = ("lr_decay", "eps", "weight_decay", "maximize")

    def states(self, group: Group) -> tuple[str, ...]:
        return ("sum",)

    def numbers(self, group: Group, lr: float, t: int) -> tuple[float, ...]:
        return (lr / (1 + (t - 1) * group["lr_decay"]),)

    def update(
        self, p: Tensor, g: Tensor, state: State, c: Sequence[Tensor], group: Group
    ) -> tuple[Tensor, State]:
        g = _decayed(-g if group["maximize"] else g, p, group)
        total = state["sum"] + g * g
        return p - c[0] * (g / (total.sqrt() + group["eps"])), {"sum": total}


class Adamax(Rule):
    """p - lr m̂ / u, u the decaying largest absolute gradient."""

    settings = ("betas", "eps", "weight_decay", "maximize")

    def states(self, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_inf"

    def numbers(self, group: Group, lr: float, t: int) -> tuple[float, ...]:
        return (lr / (1 - group["betas"][0] ** t),)

    def update(
        self, p: Tensor, g: Tensor, state: State, c: Sequence[Tensor], group: Group
    ) -> tuple[Tensor, State]:
        beta1, beta2 = group["betas"]
        g = _decayed(-g if group["maximize"] else g, p, group)
        m = state["exp_avg"].lerp(g, 1 - beta1)
        largest = torch.maximum(beta2 * state["exp_inf"], g.abs() + group["eps"])
        return p - c[0] * (m / largest), {"exp_avg": m, "exp_inf": largest}


def _decayed(g: Tensor, p: Tensor, group: Group) -> Tensor:
    decay = group["weight_decay"]
    return g + decay * p if decay else g


_RULES: dict[type, Rule] = {
    torch.optim.SGD: SGD(),
    torch.optim.Adam: Adam(),
    LightAdam: Adam(),
    torch.optim.AdamW: Adam(decoupled=True),
    torch.optim.Adagrad: Adagrad(),
    torch.optim.Adamax: Adamax(),
    PyroClippedAdam: ClippedAdam(),
}


def rule_of(optimizer: torch.optim.Optimizer, group: Group) -> Rule:
    """The rule of an optimizer; raises `UnsupportedForCompilation` without one. A subclass may compute anything."""
    rule = _RULES.get(type(optimizer))
    if rule is None:
        names = ", ".join(kind.__name__ for kind in _RULES)
        raise UnsupportedForCompilation(
            f"{type(optimizer).__name__} is not among the optimizers that compile: {names}"
        )
    if isinstance(rule, Adam) and group.get("decoupled_weight_decay"):
        return _RULES[torch.optim.AdamW]
    return rule
