"""Checks of arguments, with messages that name the argument, the expected value and the received one."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn


def not_a_tensor(name: str, x: Any) -> TypeError:
    """The error for an array, a DataFrame or a list in place of a tensor."""
    return TypeError(
        f"{name}: expected a tensor, got a {type(x).__name__}; convert it by torch.as_tensor(numpy.asarray({name}), "
        "dtype=torch.get_default_dtype())"
    )


def check_event(name: str, x: Tensor, shape: int | Sequence[int]) -> None:
    """Raises `ValueError` unless x has shape `(*, shape)` and a floating-point dtype."""
    if not isinstance(x, Tensor):
        raise not_a_tensor(name, x)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"{name}: expected a tensor of shape (*, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise _not_floating(name, x)


def _not_floating(name: str, x: Tensor) -> ValueError:
    return ValueError(
        f"{name}: expected a floating-point tensor, got {x.dtype}; convert it by {name}.to(torch.get_default_dtype())"
    )


def check_same_dtype(name: str, x: Tensor, parameter: Tensor) -> None:
    """Raises `ValueError` unless x has the dtype of the parameter, or autocast converts both."""
    if x.dtype is not parameter.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{name}: expected a tensor of the parameters' dtype {parameter.dtype}, got {x.dtype}; convert it by "
            f"{name}.to({parameter.dtype})"
        )


def check_event_dim(name: str, x: Tensor, event_dim: int) -> None:
    """Raises `ValueError` unless x has at least `event_dim` dimensions and a floating-point dtype."""
    if x.dim() < event_dim:
        raise ValueError(
            f"{name}: expected {event_dim} event dimensions, got shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise _not_floating(name, x)


def check_positive(name: str, value: int) -> int:
    """Returns `value` if it is a positive integer; raises `ValueError` otherwise."""
    if not isinstance(value, Real) or int(value) != value or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return int(value)


def check_automatic(name: str, value: bool | str) -> None:
    """Raises `ValueError` unless `value` is True, False or "auto"."""
    if value not in (True, False, "auto"):
        raise ValueError(f'{name}: expected True, False or "auto", got {value!r}')


def check_context_dim(value: int) -> int:
    """Returns `value` if it is a non-negative integer, 0 for no context; raises `ValueError` otherwise."""
    if int(value) != value or value < 0:
        raise ValueError(f"context_dim: expected an integer >= 0, got {value!r}")
    return int(value)


def read_event_shape(input_dim: int | Sequence[int]) -> torch.Size:
    """Returns `(D,)` for vectors or `(C, H, W)` for images; raises `ValueError` for anything else."""
    shape = tuple(input_dim) if isinstance(input_dim, Sequence) else (input_dim,)
    if len(shape) not in (1, 3):
        raise ValueError(f"input_dim: expected D or (C, H, W), got {input_dim!r}")
    return torch.Size(check_positive("input_dim", size) for size in shape)


def find_event_shape(module: nn.Module) -> torch.Size | None:
    """Returns the event shape by the `input_dim` of the first submodule that has one, None if none has."""
    for part in module.modules():
        input_dim: Any = getattr(part, "input_dim", None)
        if isinstance(input_dim, int | Sequence):
            return read_event_shape(input_dim)
    return None
