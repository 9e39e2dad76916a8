"""One run of model, guide and gradient as a graph whose every live tensor is an input."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .arguments import Call, place, storages, unaliased, with_tensors
from .layers import merge_layers
from .losses import loss_and_surrogate
from .refusal import Refusal, check_plain, line_of, reads_refused
from .simplify import simplify

aten = torch.ops.aten


@dataclass(frozen=True)
class LossGraph:
    """`graph`: (*params, *arguments, *beta, *others) -> (loss, *gradients), the latter of those that `reached` marks.
    `merged`: the same with equal layers computed at once, which is what is compared and compiled.

    `others` are the tensors beside parameters and arguments that the program looked up while it ran: data that the
    model closes over, buffers. They are inputs too, so that what is written into them is seen. Each argument and each of
    the others is an input by itself, whatever memory they share at the time of tracing.
    `written_arguments`, `written_others`: the inputs that the program itself writes into, by position.
    """

    graph: GraphModule
    merged: Callable[..., Any]
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
    """Runs loss and gradient once and writes down what torch computes. `arguments`: the tensors among those of the call.

    The program runs on copies of the arguments: of two arguments that are one tensor, or of an argument that the model
    also closes over, the run could not tell which one an operation reads.

    Leaves buffers and generators as they were. Raises `Refusal` where the program does what a graph cannot.
    """
    copies = unaliased(arguments)
    call = with_tensors(call, copies)

    def run() -> tuple[Tensor, list[Tensor | None]]:
        with _unchecked(), reads_refused(), torch.enable_grad():
            value, surrogate = loss_and_surrogate(call, beta)
            if not surrogate.requires_grad:
                raise Refusal("the loss depends on no parameter")
            grads = torch.autograd.grad(surrogate, list(params), allow_unused=True)
        return value.detach(), list(grads)

    with unchanged() as written:
        try:
            graph = make_fx(run)()
        except Refusal:
            raise
        except Exception as error:
            message = str(error).strip().split("\n")[0]
            raise Refusal(f"{type(error).__name__}: {message}{line_of(error)}") from error
    given = [*params, *copies, *(() if beta is None else (beta,))]
    others = _lift(graph, given, storages(copies))
    [output] = [node for node in graph.graph.nodes if node.op == "output"]
    value, grads = output.args[0]
    output.args = ((value, *(g for g in grads if g is not None)),)
    simplify(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    written_memory = storages([alias for _, alias, _ in written.kept.values()])
    if written_memory & storages(params):
        raise Refusal("the program writes into a parameter")
    with unchanged(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batches that are taken one by one
        merged = merge_layers(graph, [*given, *others])
    reached = [g is not None for g in grads]
    return LossGraph(
        graph,
        merged,
        others,
        reached,
        [i for i, t in enumerate(copies) if storages([t]) & written_memory],
        [i for i, t in enumerate(others) if storages([t]) & written_memory],
    )


def _lift(graph: GraphModule, given: Sequence[Tensor], copied: set[int]) -> list[Tensor]:
    """Makes inputs of the tensors that the graph holds: those `given`, and others, which are returned.

    A tensor made by `.data` is no object that is known, and is identified by its place. `copied`: the storages of the
    copies of arguments, which only arguments can have in this way.
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
                if value.requires_grad:
                    raise Refusal(
                        f"a tensor of shape {tuple(value.shape)} that the program reads requires a gradient and is no "
                        "parameter of it; register it by pyro.param or pyro.module, or turn requires_grad off"
                    )
                if storages([value]) & copied:
                    raise Refusal("the program reads a part of an argument past torch's operations")
                objects[id(value)] = index
                inputs.append(graph.graph.placeholder(f"other_{index - len(given)}"))
                tensors.append(value)
            node.replace_all_uses_with(inputs[index])
    for node, tensor in zip(inputs, tensors, strict=True):
        node.meta["val"] = torch.empty_like(tensor, device="meta")
    return tensors[len(given) :]


def _is_number(node: Node, value: Tensor) -> bool:
    """Whether a constant was a number of Python until the run made a tensor of it, so that nobody else can hold it."""
    return value.dim() == 0 and all(
        user.target is aten.lift_fresh_copy.default for user in node.users
    )


@contextmanager
def _unchecked() -> Iterator[None]:
    """No validation, which looks at values, in distributions made within or before."""
    with pyro.validation_enabled(False), _Unchecked(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the eager step before has said what there is to say
        yield


class _Unchecked(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _without_checks(msg["fn"])


def _without_checks(fn: Any) -> Any:
    """A distribution as it is, or a copy that does not validate."""
    base = getattr(fn, "base_dist", None)
    if isinstance(fn, nn.Module) or not isinstance(fn, torch.distributions.Distribution):
        return fn
    new_base = None if base is None else _without_checks(base)
    if new_base is base and not fn._validate_args:
        return fn
    new = copy.copy(fn)
    if new_base is not base:
        new.base_dist = new_base  # type: ignore[attr-defined]
    if new._validate_args:
        new._validate_args = False
    return new


@contextmanager
def unchanged() -> Iterator[_Keeper]:
    """Takes back what is written into tensors within, buffers above all, and puts the generators back."""
    state = pyro.util.get_rng_state()  # of all generators but those of devices
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    keeper = _Keeper()
    try:
        with keeper:
            yield keeper
    finally:
        keeper.restore()
        pyro.util.set_rng_state(state)
        for i, device_state in enumerate(devices):
            torch.cuda.set_rng_state(device_state, i)


# Buffers that kernels of batch normalisation write to without a word in their schemas.
_WRITTEN_IN_SECRET = ("running_mean", "running_var")


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


class _Keeper(TorchDispatchMode):
    """Copies every tensor before it is written to for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if not (_is_written(argument) or argument.name in _WRITTEN_IN_SECRET):
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor) and id(value) not in self.kept:
                with _disable_current_modes():
                    alias = value.detach()  # keeps its shape, whatever is done to that of the value
                    self.kept[id(value)] = value, alias, alias.clone()
        return func(*args, **kwargs)

    @torch.no_grad()
    def restore(self) -> None:
        for _, alias, before in self.kept.values():
            alias.copy_(before)
