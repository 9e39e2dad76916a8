"""How a density was made: the name of a function of `flows` and its arguments, enough to make it again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Distribution

from ..distributions import Density, FlowDistribution
from ..ops import check_context_dim, check_positive
from ..transforms.by_name import PRESETS

P = ParamSpec("P")
D = TypeVar("D", bound=Density)

# A list of sizes, a number, a name: all that a file needs to hold.
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Recipe:
    """A function of `flows` by name, and the arguments that a density was made with."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def unsaved(self) -> list[str]:
        """The names of arguments that a file cannot hold: modules, distributions, tensors, functions."""
        return [name for name, value in self.arguments.items() if not _is_plain(value)]


def recorded(make: Callable[P, D]) -> Callable[P, D]:
    """Notes on each density how it was made: `density.recipe`, a `Recipe`."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def recording(*args: P.args, **kwargs: P.kwargs) -> D:
        density = make(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()  # a later release may have others
        arguments = bound.arguments
        arguments.update(arguments.pop("options", {}))
        density.recipe = Recipe(make.__name__, {k: _plain(v) for k, v in arguments.items()})  # type: ignore[assignment]
        return density

    return recording


def exact(
    family: str,
    event_shape: int | Sequence[int],
    base: Distribution | nn.Module | None,
    num_layers: int | None,
    **options: Any,
) -> FlowDistribution:
    """The density of a preset over a base, by default a standard normal one."""
    preset = PRESETS[family]
    size = read_size(event_shape)
    options["context_dim"] = check_context_dim(options.get("context_dim", 0))
    depth = preset.num_layers if num_layers is None else check_positive("num_layers", num_layers)
    transform = preset.make(size, num_layers=depth, **options)
    if preset.is_pushing:
        transform = transform.inv
    return FlowDistribution(base_of(size, base), transform)


def read_size(event_shape: int | Sequence[int]) -> int:
    """D of vectors `(D)`; raises `ValueError` for other shapes."""
    shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    if len(shape) != 1 or isinstance(shape[0], bool) or not isinstance(shape[0], int):
        raise ValueError(
            f"event_shape: expected D or (D,), for vectors, got {event_shape!r}; Glow, RealNVPImage and NSFImage are "
            "densities of images (C, H, W)"
        )
    return check_positive("event_shape", shape[0])


def base_of(size: int, base: Distribution | nn.Module | None) -> Distribution | nn.Module:
    """The base: N(0, I) of vectors `(size)` unless given; raises `ValueError` for one of other events."""
    if base is None:
        return normal(size)
    if isinstance(base, Distribution):
        shape = tuple(base.batch_shape + base.event_shape)
        if shape[-1:] != (size,):
            raise ValueError(
                f"base: expected a distribution of vectors ({size},), got draws of shape {shape}"
            )
    return base


def normal(size: int) -> Distribution:
    """N(0, I) on vectors `(size)`, which scores any numbers, NaN included, without a check."""
    return dist.Normal(torch.zeros(size), 1.0, validate_args=False).to_event(1)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _plain(value: Any) -> Any:
    """Sequences as lists, which a file holds as they are."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value
