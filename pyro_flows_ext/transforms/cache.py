"""The cache of a transform: its last pass, reused only while nothing that the pass depends on has changed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# Attributes of a transform that are neither pickled nor copied.
UNSAVED = ("_pass_cache", "_inverse_view")

# Optimizer steps seen by this process. Tensor versions do not move under fused optimizers, nor under those that write
# `.data` (`pyro.optim.ClippedAdam` among them), so a version alone would let a stale log-det through.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


@functools.cache
def _watch_optimizers() -> None:
    """Registers the step counter once, at the first store: importing the package must change nothing."""
    register_optimizer_step_post_hook(_count_step)


class Owner(Protocol):
    """The part of a transform that the cache uses."""

    training: bool

    def _state(self) -> list[Tensor]:
        """Every tensor that a pass depends on beside its argument."""


class _Entry(NamedTuple):
    output: weakref.ref[Tensor]
    input: Tensor
    is_forward: bool
    ladj: Tensor
    state: Sequence[Tensor]
    stamp: tuple[Any, ...]


class PassCache:
    """Holds one pass (x, y, ladj) of one transform.

    The output of the pass is held weakly and frees the entry when it is collected. The input is held strongly: in a
    chain of transforms it is the output of the previous one, and may have no other reference. A hit needs the same tensor
    objects, unchanged in place, the same parameters and buffers at the same versions, no optimizer step and no
    backward pass in between, and the same grad and training modes. Writes to `parameter.data` by hand, outside an
    optimizer, are not detected: call `transform.clear_cache()` after them.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def store(
        self, owner: Owner, input: Tensor, output: Tensor, ladj: Tensor, *, is_forward: bool
    ) -> None:
        """Stores `output` and the forward `ladj` of a pass over `input`; does nothing where a change could go unnoticed."""
        state = owner._state()
        if (
            torch.is_inference_mode_enabled()
            or any(map(Tensor.is_inference, (input, output, *state)))
            or torch._C._functorch.is_functorch_wrapped_tensor(output)
        ):
            return
        _watch_optimizers()
        this = weakref.ref(self)

        def drop(dead: weakref.ref[Tensor]) -> None:
            cache = this()
            if cache is not None and cache._entry is not None and cache._entry.output is dead:
                cache._entry = None

        reference = weakref.ref(output, drop)
        # A backward pass frees the graph of the entry, and a second one through it would raise. The hooks sit on the
        # graph, not on the tensors, and hold no part of the entry: that would be a cycle which nothing collects.
        for tensor in (output, ladj):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: drop(reference))
        stamp = _stamp(input, output, state, owner.training)
        self._entry = _Entry(reference, input, is_forward, ladj, state, stamp)

    def lookup(
        self, owner: Owner, *, x: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns the stored (x, y, ladj) if it belongs to these very tensors (None: any) and is still valid, else None."""
        entry = self._entry
        if entry is None or (output := entry.output()) is None:
            return None
        x_, y_ = (entry.input, output) if entry.is_forward else (output, entry.input)
        if (x is not None and x is not x_) or (y is not None and y is not y_):
            return None
        # The entry holds its parameters, so none of their ids can have been given to another tensor.
        state = owner._state()
        if list(map(id, entry.state)) != list(map(id, state)) or torch.is_inference_mode_enabled():
            return None
        if entry.stamp != _stamp(entry.input, output, state, owner.training):
            return None
        return x_, y_, entry.ladj

    def clear(self) -> None:
        """Drops the stored pass."""
        self._entry = None


def find_state(module: nn.Module) -> list[Tensor]:
    """Returns the parameters, the buffers and the bound tensors of a module and of its submodules.

    Bound tensors are those that a conditioned transform uses in place of parameters. A module whose passes depend on
    further tensors returns them from a method `_watched()`.
    """
    state: list[Any] = []
    stack: list[Any] = [module]
    # By hand: a pass of `Module.parameters()` over a flow of four layers takes ten times as long.
    while stack:
        part = stack.pop()
        attributes = part.__dict__
        state += attributes["_parameters"].values()
        state += attributes["_buffers"].values()
        state += attributes.get("_bound", ())
        stack += attributes["_modules"].values()
        if (watched := getattr(type(part), "_watched", None)) is not None:
            state += watched(part)
    return [tensor for tensor in state if tensor is not None]


_mutable = attrgetter("_version", "requires_grad")


def _stamp(
    input: Tensor, output: Tensor, state: Sequence[Tensor], training: bool
) -> tuple[Any, ...]:
    modes = (torch.is_grad_enabled(), training, _optimizer_steps)
    return (*modes, _mutable(input), _mutable(output), *map(_mutable, state))
