"""Masks that split the elements of a vector between passing through a coupling layer and being transformed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Mask = str | Sequence[bool] | Tensor


def passed_elements(mask: Mask, dim: int, flip: bool) -> list[bool]:
    """The mask as `dim` Python booleans, True for an element that passes through."""
    if dim == 1:
        raise ValueError(
            "input_dim: a coupling layer needs two elements at least, one to pass and one to transform, got 1; use an "
            "autoregressive, planar or radial transform in one dimension"
        )
    if isinstance(mask, str):
        named = {
            "half": [i < dim // 2 for i in range(dim)],
            "alternating": [i % 2 == 0 for i in range(dim)],
        }
        if mask not in named:
            raise ValueError(f"mask: expected one of {list(named)} or booleans, got {mask!r}")
        passes = named[mask]
    else:
        tensor = torch.as_tensor(mask)
        if tensor.dtype != torch.bool or tensor.shape != (dim,):
            raise ValueError(
                f"mask: expected booleans of shape ({dim},), got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        passes = tensor.tolist()
    if all(passes) or not any(passes):
        raise ValueError(
            f"mask: expected some elements to pass and some to be transformed, got {passes[0]} for all {dim}"
        )
    return [p != flip for p in passes]
