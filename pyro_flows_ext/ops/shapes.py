"""Shapes that broadcast against each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """`torch.broadcast_shapes` without the import of sympy, half a second, at its first call.

    Raises:
        RuntimeError: where the shapes do not broadcast, as torch's.
    """
    length = 0
    for shape in shapes:
        length = max(length, len(shape))
    result: list[int] = [1] * length
    for shape in shapes:
        offset = len(result) - len(shape)
        for i, size in enumerate(shape, offset):
            if size == 1 or size == result[i]:
                continue
            if result[i] != 1:
                raise RuntimeError(
                    f"shapes {', '.join(str(tuple(s)) for s in shapes)}: expected sizes that broadcast, got "
                    f"{result[i]} and {size} in dimension {i - len(result)}"
                )
            result[i] = size
    return torch.Size(result)
