"""Composition of transforms into one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn

from .base import FlowTransform


class ComposeFlow(FlowTransform):
    """y = f_K(... f_1(x)), with the log-dets added up: several transforms as one.

    Unlike `ComposeTransformModule` it gives the value and the log-det of the whole chain in one pass, in either
    direction. `len`, iteration and indexing reach the parts. Raises `TypeError` for a part that is no
    `FlowTransform`, `ValueError` for none at all.
    """

    def __init__(self, parts: Sequence[FlowTransform]):
        super().__init__()
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one transform, got none")
        for part in parts:
            if not isinstance(part, FlowTransform):
                raise TypeError(f"parts: expected FlowTransforms, got a {type(part).__name__}")
        self.parts = nn.ModuleList(parts)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._chain(list(self), "forward_and_ladj", x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._chain(list(self)[::-1], "inverse_and_ladj", y)

    @staticmethod
    def _chain(parts: list[FlowTransform], method: str, x: Tensor) -> tuple[Tensor, Tensor]:
        event_dim = max(part.domain.event_dim for part in parts)
        ladjs = []
        for part in parts:
            x, ladj = getattr(part, method)(x)
            ladjs.append(sum_rightmost(ladj, event_dim - part.domain.event_dim))
        return x, functools.reduce(torch.add, ladjs)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        for part in self:
            shape = part.forward_shape(shape)
        return torch.Size(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        for part in reversed(list(self)):
            shape = part.inverse_shape(shape)
        return torch.Size(shape)

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return self[0].domain

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self[len(self) - 1].codomain

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        return torch.broadcast_shapes(*(part.batch_shape for part in self))

    @property
    def sign(self) -> int:
        sign = 1
        for part in self:
            sign = sign * part.sign
        return sign

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[FlowTransform]:
        return iter(self.parts)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> FlowTransform:
        return self.parts[index]  # type: ignore[return-value]

    def __repr__(self) -> str:
        lines = [f"  ({i}): {part!r}".replace("\n", "\n  ") for i, part in enumerate(self)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])
