"""Masks that split the elements of an event between passing through a coupling layer and being transformed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Mask = str | Sequence[Any] | Tensor


def passed_elements(mask: Mask, shape: Sequence[int], flip: bool) -> list[bool]:
    """The mask over an event of `shape` `(D,)` or `(C, H, W)`, row by row: True for an element that passes through.

    Names: "half" and "alternating" go by the elements of a vector, and by the channels of an image; "channel" (for
    "half") and "checkerboard" are for images alone.
    """
    shape = tuple(shape)
    if math.prod(shape) == 1:
        raise ValueError(
            "input_dim: a coupling layer needs two elements at least, one to pass and one to transform, got 1; use an "
            "autoregressive, planar or radial transform in one dimension"
        )
    if isinstance(mask, str):
        passes = _named(mask, shape)
    else:
        tensor = torch.as_tensor(mask)
        if tensor.dtype != torch.bool or tensor.shape != shape:
            raise ValueError(
                f"mask: expected booleans of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        passes = tensor.flatten().tolist()
    if all(passes) or not any(passes):
        hint = "; one channel can be split by 'checkerboard'" if shape[0] == 1 else ""
        raise ValueError(
            f"mask: expected some elements to pass and some to be transformed, got {passes[0]} for all of shape "
            f"{shape}{hint}"
        )
    return [p != flip for p in passes]


def _named(mask: str, shape: tuple[int, ...]) -> list[bool]:
    rules: dict[str, Callable[[tuple[int, ...]], bool]] = {
        "half": lambda index: index[0] < shape[0] // 2,
        "alternating": lambda index: index[0] % 2 == 0,
    }
    if len(shape) == 3:
        rules["channel"] = rules["half"]
        rules["checkerboard"] = lambda index: (index[1] + index[2]) % 2 == 0
    if mask not in rules:
        raise ValueError(
            f"mask: expected one of {list(rules)} or booleans for an event of shape {shape}, got {mask!r}"
        )
    return [rules[mask](index) for index in itertools.product(*map(range, shape))]
