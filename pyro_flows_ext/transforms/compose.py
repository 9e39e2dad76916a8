"""Composition of transforms into one, plain and conditional."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from typing_extensions import Self

from .base import FlowTransform
from .conditional import ConditionalModule


class _Chain:
    """Parts that are reached by `len`, iteration and indexing, and listed by `repr`."""

    parts: nn.ModuleList

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __getitem__(self, index: int) -> Any:
        return self.parts[index]

    def __repr__(self) -> str:
        lines = [f"  ({i}): {part!r}".replace("\n", "\n  ") for i, part in enumerate(self)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])


class ComposeFlow(_Chain, FlowTransform):
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
        self._outer_dims = _outer_dims(parts)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._chain("forward_and_ladj", x, 1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._chain("inverse_and_ladj", y, -1)

    def _chain(self, method: str, x: Tensor, order: int) -> tuple[Tensor, Tensor]:
        ladjs = []
        for part, outer in zip(list(self)[::order], self._outer_dims[::order], strict=True):
            x, ladj = getattr(part, method)(x)
            ladjs.append(sum_rightmost(ladj, outer))
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
        return _widened(self[0].domain, self._outer_dims[0])

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return _widened(self[-1].codomain, self._outer_dims[-1])

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        shapes = (part.batch_shape for part in self)
        return torch.broadcast_shapes(
            *(s[: max(0, len(s) - n)] for s, n in zip(shapes, self._outer_dims, strict=True))
        )

    @property
    def sign(self) -> int:
        sign = 1
        for part in self:
            sign = sign * part.sign
        return sign

    def with_context(self, context: Tensor) -> Self:
        """This chain with `context` `(*, C)` given to every part that was built to read one, the others as they are.

        Raises `ValueError` when no part reads a context.
        """
        if not reads_context(self):
            raise ValueError(
                "with_context: no part of this ComposeFlow reads a context; build parts with context_dim > 0"
            )
        view = self._view(torch.Size())  # the batch shape comes from the parts
        parts = nn.ModuleList([at_context(part, context) for part in self])
        view.__dict__["_modules"] = {**self._modules, "parts": parts}
        return view

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """Raises `TypeError`: a chain has no parameters of its own to replace, its parts have."""
        raise TypeError(
            f"bind: a {type(self).__name__} has no parameters of its own; bind its parts and compose the results, or for "
            "parameters by context make the parts conditional and compose them by ConditionalComposeFlow"
        )

    def _state(self) -> list[Tensor]:
        # By part: what a part is bound to is no parameter of anything.
        return [t for part in self for t in part._state()]


class ConditionalComposeFlow(_Chain, ConditionalModule):
    """x -> f_K(... f_1(x; c) ...; c): several transforms as one, of which some depend on a context.

    `parts` are `FlowTransform`s and conditional transforms, in the order in which they apply. `condition(context)` with
    a context `(*, C)` gives it to all parts that take one and returns a `ComposeFlow` of batch shape `(*)`, over the
    same parameters. `len`, iteration and indexing reach the parts.
    Raises `TypeError` for a part that is neither, `ValueError` when no part takes a context.
    """

    def __init__(self, parts: Sequence[FlowTransform | ConditionalTransformModule]):
        super().__init__()
        parts = list(parts)
        for part in parts:
            if not isinstance(part, FlowTransform | ConditionalTransformModule):
                raise TypeError(
                    f"parts: expected FlowTransforms and ConditionalTransformModules, got a {type(part).__name__}"
                )
        if not any(map(reads_context, parts)):
            raise ValueError(
                "parts: expected at least one that takes a context, got none; use ComposeFlow"
            )
        self.parts = nn.ModuleList(parts)

    def condition(self, context: Tensor) -> ComposeFlow:
        """The transform for this context: `(*, C)` -> a `ComposeFlow` of batch shape `(*)`."""
        return ComposeFlow([at_context(part, context) for part in self])


def reads_context(part: FlowTransform | ConditionalTransformModule) -> bool:
    """Whether a context changes this transform: it is conditional, or was built with a `context_dim`."""
    if isinstance(part, ConditionalTransformModule):
        return True
    if isinstance(part, ComposeFlow):
        return any(map(reads_context, part))
    inner = getattr(part, "transform", None)  # of an inverse, or what another wraps
    return bool(getattr(part, "context_dim", 0)) or (
        isinstance(inner, FlowTransform) and reads_context(inner)
    )


def at_context(part: FlowTransform | ConditionalTransformModule, context: Tensor) -> FlowTransform:
    """The transform at this context; the part itself where it reads none."""
    if isinstance(part, ConditionalTransformModule):
        return part.condition(context)
    return part.with_context(context) if reads_context(part) else part


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


def _widened(constraint: Any, outer: int) -> Any:
    return constraints.independent(constraint, outer) if outer else constraint
