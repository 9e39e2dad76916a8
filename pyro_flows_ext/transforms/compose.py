"""Composition of transforms into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from typing_extensions import Self

from ..ops import broadcast_shapes
from .base import FlowTransform, InverseFlow
from .context import common_context_dim


class ComposeFlow(FlowTransform):
    """y = f_K(... f_1(x)), with log-dets added up: several transforms as one.

    Unlike `pyro.distributions.transforms.ComposeTransformModule`, it returns value and log-det of the whole chain in
    one pass, in either direction. `len`, iteration and indexing reach the parts. With parts that depend on a
    context, `condition(context)` conditions all of them.

    Args:
        parts: the transforms f_1, ..., f_K, in the order in which they apply.

    Raises:
        TypeError: if a part is not a `FlowTransform`.
        ValueError: if there are no parts, or if two of them expect contexts of different sizes.

    Example:
        >>> flow = ComposeFlow([ElementwiseAffine(3), Planar(3, context_dim=2)])
        >>> flow.condition(torch.zeros(5, 2)).forward_shape((3,))
        torch.Size([5, 3])
    """

    parts: Any

    def __init__(self, parts: Sequence[FlowTransform]):
        super().__init__()
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one transform, got none")
        for part in parts:
            if not isinstance(part, FlowTransform):
                raise TypeError(f"parts: expected FlowTransforms, got a {type(part).__name__}")
        self.parts = nn.ModuleList(parts)
        self.context_dim = common_context_dim(parts)
        # Constant for the life of the chain, and needed at every pass.
        self._outer_dims = _outer_dims(parts)
        self.batch_shape = self._find_batch_shape(parts)
        self._keeps_shape = all(map(_keeps_shape, parts))
        self.carries_scores = all(part.carries_scores for part in parts)
        self._find_ends()

    def _find_ends(self) -> None:
        self.domain = _widened(self[0].domain, self._outer_dims[0])
        self.codomain = _widened(self[-1].codomain, self._outer_dims[-1])

    def __getstate__(self) -> dict[str, Any]:
        # torch and Pyro compare constraints by identity, which a copy of one would not have.
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("domain", "codomain")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_ends()

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = None
        for part, outer in zip(self.parts, self._outer_dims, strict=True):
            x, ladj = part.forward_and_ladj(x)
            ladj = sum_rightmost(ladj, outer) if outer else ladj
            total = ladj if total is None else total + ladj
        return x, total

    def forward_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total: Any = None
        for part in self:
            x, ladj, score = part.forward_and_score(x, score)
            total = ladj if total is None else total + ladj
        return x, total, score

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        total: Any = None
        for part, outer in zip(reversed(self.parts), self._outer_dims[::-1], strict=True):
            y, ladj = part.inverse_and_ladj(y)
            ladj = sum_rightmost(ladj, outer) if outer else ladj
            total = ladj if total is None else total + ladj
        return y, total

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        if self._keeps_shape:
            return self._broadcast_shape(shape, self.domain.event_dim)
        for part in self:
            shape = part.forward_shape(shape)
        return torch.Size(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        if self._keeps_shape:
            return self._broadcast_shape(shape, self.codomain.event_dim)
        for part in reversed(list(self)):
            shape = part.inverse_shape(shape)
        return torch.Size(shape)

    def _find_batch_shape(self, parts: Sequence[FlowTransform]) -> torch.Size:
        shapes = (part.batch_shape for part in parts)
        return broadcast_shapes(
            *(s[: max(0, len(s) - n)] for s, n in zip(shapes, self._outer_dims, strict=True))
        )

    @property
    def sign(self) -> int:
        sign = 1
        for part in self:
            sign = sign * part.sign
        return sign

    def condition(self, context: Tensor) -> Self:
        """Returns this chain with all parts at a context `(*, context_dim)`; itself where no part depends on one."""
        if not self.context_dim:
            return self
        parts = [part.condition(context) for part in self]
        return self._with_modules(self._find_batch_shape(parts), parts=nn.ModuleList(parts))

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """Raises `TypeError`: a chain has no parameters of its own, its parts have."""
        raise TypeError(
            f"bind: expected a transform with parameters, got a {type(self).__name__}, whose parts have them; bind the "
            "parts and compose the results, or build the parts with context_dim and call condition(context)"
        )

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __getitem__(self, index: int) -> Any:
        return self.parts[index]

    def __repr__(self) -> str:
        lines = [f"  ({i}): {part!r}".replace("\n", "\n  ") for i, part in enumerate(self)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


def _outer_dims(parts: Sequence[FlowTransform]) -> list[int]:
    """For each part, how many dimensions of the chain's event at that place lie outside the part's own event."""
    # The number of dimensions of the chain's event where it begins, if each part's own event shall fit in.
    needed, change = 0, 0
    for part in parts:
        needed = max(needed, part.domain.event_dim - change)
        change += part.codomain.event_dim - part.domain.event_dim
    outer, event_dim = [], needed
    for part in parts:
        outer.append(event_dim - part.domain.event_dim)
        event_dim += part.codomain.event_dim - part.domain.event_dim
    return outer


def _keeps_shape(part: FlowTransform) -> bool:
    """Whether events keep their shape and broadcast against the batch shape alone."""
    if isinstance(part, InverseFlow):
        return _keeps_shape(part.transform)
    if isinstance(part, ComposeFlow):
        return part._keeps_shape
    cls = type(part)
    return (
        cls.forward_shape is FlowTransform.forward_shape
        and cls.inverse_shape is FlowTransform.inverse_shape
        and part.domain.event_dim == part.codomain.event_dim
    )


def _widened(constraint: Any, outer: int) -> Any:
    return constraints.independent(constraint, outer) if outer else constraint
