"""What is called: a loss of model and guide with arguments, in parts that a graph has as constants or as inputs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..particles import Program
from .refusal import Refusal

# What is no container, which a step need not look into.
_PLAIN = (int, float, bool, str, type(None))


class Call(NamedTuple):
    """The loss of a model and a guide with some arguments."""

    loss: Any  # an ELBO; its abstract base declares no loss
    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def read_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, list[Tensor]]:
    """The key: structure, shapes, layouts, and the values of all that is no tensor. Raises `Refusal` if those have no hash."""
    leaves: list[Any] = [*args, *kwargs.values()]
    key: list[Any] = [len(args), *kwargs]
    if not all(isinstance(leaf, Tensor) or type(leaf) in _PLAIN for leaf in leaves):
        leaves, structure = tree_flatten((args, kwargs))
        key = [structure]
    tensors: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            key.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad))
            tensors.append(leaf)
            continue
        try:
            hash(leaf)
        except TypeError:
            raise Refusal(
                f"an argument of type {type(leaf).__name__} can be neither an input nor a constant; pass a tensor"
            ) from None
        key.append((type(leaf), leaf))
    return tuple(key), tensors


@contextmanager
def parameters_met() -> Iterator[dict[str, Tensor]]:
    """The unconstrained parameters, by name, that a program within met: filled in at the end."""
    met: dict[str, Tensor] = {}
    with poutine.trace(param_only=True) as capture:
        yield met
    sites: Any = capture.trace.nodes.items()
    met |= {name: site["value"].unconstrained() for name, site in sites if site["type"] == "param"}
