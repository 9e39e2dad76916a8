"""Tensors, arrays and shapes of all kinds, drawn by a seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
BATCHES: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (2, 3), (2, 0), (1, 4)]


@dataclass(frozen=True)
class Input:
    """A tensor, whether it is what the call asks for, and what is unusual about it."""

    tensor: Tensor
    fits: bool
    is_finite: bool
    scale: float
    what: str


def draw(rng: random.Random, event: tuple[int, ...], dtype: torch.dtype) -> Input:
    """A tensor for an event shape: mostly one that fits, in any batch shape, scale and layout."""
    batch, shape, fits, words = rng.choice(BATCHES), event, True, []
    if rng.random() < 0.12:
        shape, fits = _other_shape(rng, event), False
        words.append("shape")
    scale = 10.0 ** (rng.uniform(-30, 30) if rng.random() < 0.3 else rng.uniform(-1, 1))
    x = scale * torch.randn((*batch, *shape), dtype=torch.float64)
    is_finite = True
    if x.numel() and rng.random() < 0.1:
        bad = rng.choice([math.nan, math.inf, -math.inf])
        x.view(-1)[rng.randrange(x.numel())] = bad
        is_finite = False
        words.append(str(bad))
    elif rng.random() < 0.05:
        x.zero_()
        words.append("zeros")
    if rng.random() < 0.12:
        dtype, fits = rng.choice(DTYPES), False
        words.append(str(dtype))
    x = x.to(dtype)
    if x.is_floating_point():
        is_finite = is_finite and bool(x.isfinite().all())
    x, layout = _laid_out(rng, x)
    words += [f"scale 1e{math.log10(scale):.0f}", str(tuple(x.shape)), layout]
    return Input(x, fits, is_finite, scale, ", ".join(words))


def _other_shape(rng: random.Random, event: tuple[int, ...]) -> tuple[int, ...]:
    size = event[-1] if event else 1
    return rng.choice([(), (size + 1,), (0,), (*event, 2), (1,) * (len(event) + 1)])


def _laid_out(rng: random.Random, x: Tensor) -> tuple[Tensor, str]:
    """The same values in another layout."""
    kind = rng.choice(["plain", "plain", "strided", "transposed", "expanded", "gradient"])
    if kind == "strided":
        return torch.stack([x, x], -1)[..., 0], kind
    if kind == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1), kind
    if kind == "expanded":
        return x.unsqueeze(0).expand(2, *x.shape), kind
    if kind == "gradient" and x.is_floating_point():
        return x.clone().requires_grad_(), kind
    return x, "plain"


def as_data(rng: random.Random, x: Tensor) -> Any:
    """The tensor as an array, a DataFrame or itself."""
    kind = rng.choice(["tensor", "array", "frame"])
    if kind == "tensor" or x.dtype == torch.bfloat16:
        return x
    array = x.detach().numpy()
    if kind == "frame" and array.ndim == 2:
        import pandas as pd

        return pd.DataFrame(array)
    return array
