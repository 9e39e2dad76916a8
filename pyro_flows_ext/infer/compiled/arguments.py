"""Arguments of a call: which of them are inputs of a graph, which are constants, and which share memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine import runtime
from torch import Tensor

from ...programs import Program
from ..elbo import AnnealedELBO
from .refusal import Refusal, check_plain

_PLAIN = (int, bool, str, type(None))


class Call(NamedTuple):
    """The loss of a model and a guide with some arguments."""

    loss: Any  # an ELBO; its abstract base declares no loss
    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def state_of(call: Call) -> list[Any]:
    """The objects of a call that have a state beside its tensors; not the counter of an annealed loss."""
    loss = call.loss.elbo if isinstance(call.loss, AnnealedELBO) else call.loss
    leaves = [
        leaf for leaf in _flatten((call.args, call.kwargs))[0] if not isinstance(leaf, Tensor)
    ]
    return [call.model, call.guide, loss, *leaves]


def read_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, list[Tensor]]:
    """The key of a call, and its tensors.

    The key holds the structure, the layout of every tensor, the values of all other leaves, and the global settings of
    torch that a graph has as constants.

    Raises `Refusal` for leaves without a hash, for tensors that a graph cannot take, and for settings under which
    compiled steps would differ from eager ones.
    """
    leaves: list[Any] = [*args, *kwargs.values()]
    key: list[Any] = [_settings(), len(args), *kwargs]
    if not all(type(leaf) is Tensor or type(leaf) in _PLAIN for leaf in leaves):
        leaves, structure = _flatten((args, kwargs))
        key[1:] = [structure]
    tensors: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            check_plain(leaf, "an argument")
            if leaf.requires_grad:
                raise Refusal(
                    "an argument requires a gradient, which compiled steps do not accumulate; pass argument.detach(), or "
                    "register a parameter by pyro.param or pyro.module"
                )
            key.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
            tensors.append(leaf)
        else:
            key.append(_constant(leaf))
    return tuple(key), tensors


def _settings() -> Hashable:
    if runtime._PYRO_STACK:
        raise Refusal(
            "the step is called within a Pyro handler, whose effects a graph would keep; apply handlers to model or guide"
        )
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise Refusal("gradients are disabled; call the step outside of no_grad and inference_mode")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Refusal("autocast is enabled, which a graph would apply twice")
    return torch.get_default_dtype()


def _constant(leaf: Any) -> Hashable:
    """A leaf that is no tensor, by type and value."""
    if isinstance(leaf, float):  # -0.0 == 0.0 and NaN != NaN
        return type(leaf), leaf.hex()
    try:
        hash(leaf)
    except TypeError:
        raise Refusal(
            f"an argument of type {type(leaf).__name__} has no hash, and so can be neither an input nor a constant; pass a "
            "tensor"
        ) from None
    return type(leaf), leaf


# --- aliases ---


def place(tensor: Tensor) -> Hashable:
    """Where the elements of a tensor lie: storage, offset, shape, strides, dtype. Unique to a tensor without elements."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def aliases(tensors: Sequence[Tensor], known: Sequence[Tensor] = ()) -> Hashable:
    """For each tensor, the first of `known` and of the tensors before it that is the same object or has the same elements.

    None where no two are aliases. Tensors that overlap in part are no aliases: each is an input by itself.
    """
    objects: dict[Any, int] = {}
    places: dict[Any, int] = {}
    for i, tensor in enumerate(known):
        objects.setdefault(id(tensor), i)
        places.setdefault(place(tensor), i)
    pattern = []
    for i, tensor in enumerate(tensors, len(known)):
        first = objects.setdefault(id(tensor), i), places.setdefault(place(tensor), i)
        pattern.append(None if first == (i, i) else first)
    return tuple(pattern) if any(first is not None for first in pattern) else None


def storages(tensors: Sequence[Tensor]) -> set[int]:
    """The addresses of the storages of tensors with elements."""
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def unaliased(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, in memory of their own, with the strides that they have."""
    copies = []
    for tensor in tensors:
        if tensor.numel() == 0:
            copies.append(
                torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
            )
            continue
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        memory = tensor.detach().as_strided((extent,), (1,)).clone()
        copies.append(memory.as_strided(tensor.shape, tensor.stride(), 0))
    return copies


def with_tensors(call: Call, tensors: Sequence[Tensor]) -> Call:
    """The call with other tensors in the place of those that `read_arguments` found."""
    from torch.utils._pytree import tree_unflatten

    leaves, structure = _flatten((call.args, call.kwargs))
    rest = iter(tensors)
    replaced = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(replaced, structure)
    return call._replace(args=args, kwargs=kwargs)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    from torch.utils._pytree import tree_flatten

    return tree_flatten(tree)


@contextmanager
def parameters_met() -> Iterator[dict[str, Tensor]]:
    """The unconstrained parameters, by name, that a program within met: filled in at the end."""
    met: dict[str, Tensor] = {}
    with poutine.trace(param_only=True) as capture:
        yield met
    sites: Any = capture.trace.nodes.items()
    met |= {name: site["value"].unconstrained() for name, site in sites if site["type"] == "param"}
