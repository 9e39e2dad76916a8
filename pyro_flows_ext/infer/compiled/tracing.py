"""Loss and gradient as a graph whose every live tensor is an input."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .call import Call, loss_and_surrogate, place, storages, unaliased, with_tensors
from .lowering import simplify
from .unsupported import (
    UnsupportedForCompilation,
    check_plain,
    line_of,
    value_reads_unsupported,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class LossGraph:
    """`graph`: (*params, *arguments, *beta, *others) -> (loss, *gradients), with gradients of the `reached` parameters.

    `others`: tensors beside parameters and arguments that the program reads, such as closed-over data and buffers. As
    inputs they are read at every step. Each argument and each of the others is an input by itself, whatever memory they
    share at the time of tracing. `written_arguments`, `written_others`: positions of inputs that the program writes to.
    """

    graph: GraphModule
    others: list[Tensor]
    reached: list[bool]
    written_arguments: list[int]
    written_others: list[int]

    @property
    def writes(self) -> bool:
        """Whether the program writes into any of its inputs."""
        return bool(self.written_arguments or self.written_others)


def trace_loss(
    call: Call, params: Sequence[Tensor], arguments: Sequence[Tensor], beta: Tensor | None
) -> LossGraph:
    """Runs loss and gradient once and records the operations of torch.

    The program runs on copies of the arguments. On the arguments themselves, operations on two of them that are one
    tensor, or on one that the model also closes over, could not be told apart. Buffers and generators are restored.

    Raises `UnsupportedForCompilation` where the program does what a graph cannot.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    copies = unaliased(arguments)
    call = with_tensors(call, copies)

    def run() -> tuple[Tensor, list[Tensor | None]]:
        with _without_validation(), value_reads_unsupported(), torch.enable_grad():
            value, surrogate = loss_and_surrogate(call, beta)
            if not surrogate.requires_grad:
                raise UnsupportedForCompilation("the loss depends on no parameter")
            grads = torch.autograd.grad(surrogate, list(params), allow_unused=True)
        return value.detach(), list(grads)

    with unchanged() as writes:
        try:
            graph = make_fx(run)()
        except UnsupportedForCompilation:
            raise
        except Exception as error:
            message = str(error).strip().split("\n")[0]
            raise UnsupportedForCompilation(
                f"{type(error).__name__}: {message}{line_of(error)}"
            ) from error
    given = [*params, *copies, *(() if beta is None else (beta,))]
    others = _lift(graph, given, storages(copies))
    [output] = [node for node in graph.graph.nodes if node.op == "output"]
    value, grads = output.args[0]
    output.args = ((value, *(g for g in grads if g is not None)),)
    simplify(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    written = storages([alias for _, alias, _ in writes.kept.values()])
    if written & storages(params):
        raise UnsupportedForCompilation("the program writes into a parameter")
    return LossGraph(
        graph,
        others,
        [g is not None for g in grads],
        [i for i, t in enumerate(copies) if storages([t]) & written],
        [i for i, t in enumerate(others) if storages([t]) & written],
    )


def _lift(graph: GraphModule, given: Sequence[Tensor], copied: set[int]) -> list[Tensor]:
    """Makes inputs of the tensors that the graph holds: those `given`, and others, which are returned.

    A tensor made by `.data` is a new object, and is identified by its place. `copied`: the storages of the copies of
    arguments, in which no other tensor lies.
    """
    places = {place(t): i for i, t in reversed(list(enumerate(given)))}
    objects = {id(t): i for i, t in enumerate(given)}
    nodes = [n for n in graph.graph.nodes if n.op == "get_attr"]
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        inputs = [graph.graph.placeholder(f"given_{i}") for i in range(len(given))]
        tensors = list(given)
        for node in nodes:
            value = getattr(graph, node.target)
            if not isinstance(value, Tensor) or _is_number(node, value):
                continue
            check_plain(value, "a tensor that the program reads")
            index = objects.get(id(value), places.get(place(value), len(tensors)))
            if index == len(tensors):
                _check_other(value, copied)
                objects[id(value)] = index
                inputs.append(graph.graph.placeholder(f"other_{index - len(given)}"))
                tensors.append(value)
            node.replace_all_uses_with(inputs[index])
    for node, tensor in zip(inputs, tensors, strict=True):
        node.meta["val"] = torch.empty_like(tensor, device="meta")
    return tensors[len(given) :]


def _check_other(value: Tensor, copied: set[int]) -> None:
    if value.requires_grad:
        raise UnsupportedForCompilation(
            f"a tensor of shape {tuple(value.shape)} that the program reads requires a gradient and is no parameter of it; "
            "register it by pyro.param or pyro.module, or set its requires_grad to False"
        )
    if storages([value]) & copied:
        raise UnsupportedForCompilation(
            "the program reads a part of an argument past torch's operations"
        )


def _is_number(node: Node, value: Tensor) -> bool:
    """Whether a constant is a Python number that the run made a tensor of, so that no other code holds it."""
    return value.dim() == 0 and all(
        user.target is aten.lift_fresh_copy.default for user in node.users
    )


# --- without validation, which reads values ---


@contextmanager
def _without_validation() -> Iterator[None]:
    with pyro.validation_enabled(False), _Unvalidated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the eager step before has given the warnings
        yield


class _Unvalidated(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unvalidated(msg["fn"])


def _unvalidated(fn: Any) -> Any:
    """The distribution itself, or a copy without validation."""
    base = getattr(fn, "base_dist", None)
    if isinstance(fn, nn.Module) or not isinstance(fn, torch.distributions.Distribution):
        return fn
    new_base = None if base is None else _unvalidated(base)
    if new_base is base and not fn._validate_args:
        return fn
    new: Any = copy.copy(fn)
    if new_base is not base:
        new.base_dist = new_base
    if new._validate_args:
        new._validate_args = False
    return new


# --- runs that leave no trace ---


@contextmanager
def unchanged() -> Iterator[Any]:
    """Restores tensors that are written to within, buffers above all, and the generators.

    Yields an object whose `kept` has what was written to.
    """
    state = pyro.util.get_rng_state()  # of all generators but those of devices
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    writes = _write_mode()()
    try:
        with writes:
            yield writes
    finally:
        with torch.no_grad():
            for _, alias, before in writes.kept.values():
                alias.copy_(before)
        pyro.util.set_rng_state(state)
        for i, device_state in enumerate(devices):
            torch.cuda.set_rng_state(device_state, i)


# Buffers that the kernels of batch normalisation write to, which their schemas do not declare.
_UNDECLARED_WRITES = ("running_mean", "running_var")


@functools.cache
def _write_mode() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    class Writes(TorchDispatchMode):
        """Copies every tensor before it is written to for the first time."""

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            for i, argument in enumerate(func._schema.arguments):
                if not (_is_written(argument) or argument.name in _UNDECLARED_WRITES):
                    continue
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                if isinstance(value, Tensor) and id(value) not in self.kept:
                    with _disable_current_modes():
                        alias = value.detach()  # keeps its shape when that of the value changes
                        self.kept[id(value)] = value, alias, alias.clone()
            return func(*args, **kwargs)

    return Writes


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write
