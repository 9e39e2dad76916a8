"""The two parts of an event in a coupling layer: one passes and feeds the network, the other is transformed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .masks import Mask, passed_elements


class Split(nn.Module, ABC):
    """The two parts of an event `(D,)` or `(C, H, W)`, by a mask that is True for the elements that pass.

    `seen` is the shape of what feeds the network, `transformed` that of what the network gives parameters for: vectors
    or images, as the event is.
    """

    mask: Tensor
    seen: tuple[int, ...]
    transformed: tuple[int, ...]

    def __init__(self, passes: Sequence[bool], shape: Sequence[int]):
        super().__init__()
        self.register_buffer("mask", torch.tensor(passes).reshape(tuple(shape)))

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `(*, event)` -> the input of the network `(*, seen)`, and the N elements to transform, in a row: `(*, N)`."""

    @abstractmethod
    def join(self, seen: Tensor, value: Tensor) -> Tensor:
        """The inverse of `split`."""

    def total(self, log_slope: Tensor) -> Tensor:
        """Σ log_slope `(*, N)` over the elements that are transformed: `(*)`."""
        return log_slope.sum(-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The shapes of two masks can agree where their meaning does not.
        saved = state_dict.get(f"{prefix}mask", self.mask)
        if not (saved.is_meta or self.mask.is_meta) and saved.tolist() != self.mask.tolist():
            raise ValueError(
                f"{prefix}mask: expected the mask of this layer, of shape {tuple(self.mask.shape)}, the saved one has shape "
                f"{tuple(saved.shape)} and other values; build the transform with the mask that it was saved with"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class AxisSplit(Split):
    """A mask over the first dimension of the event: over the elements of a vector, or the channels of an image.

    Nothing is computed for what passes, and two halves are views.
    """

    _order: Tensor
    _inverse_order: Tensor

    def __init__(self, passes: Sequence[bool], shape: Sequence[int]):
        super().__init__(passes, shape)
        n, *pixels = shape
        slices = passes[:: len(passes) // n]
        # Blocks in the order in which they begin, so that two halves need no index, only views. By Python, not by
        # `nonzero`: a layer can be built on the meta device.
        order = sorted(range(n), key=lambda i: slices[i] != slices[0])
        self._passed_first, self._in_order = slices[0], order == list(range(n))
        self._sizes = (sum(slices), n - sum(slices))
        self._axis = -len(shape)
        self.seen, self.transformed = ((size, *pixels) for size in self._sizes)
        self.register_buffer("_order", torch.tensor(order))
        self.register_buffer(
            "_inverse_order", torch.tensor(sorted(range(n), key=order.__getitem__))
        )

    @property
    def columns(self) -> tuple[slice, slice] | None:
        """The elements that pass and those transformed, as slices of the event's first dimension; None if they are none."""
        if not self._in_order:
            return None
        n, size = sum(self._sizes), self._sizes[0 if self._passed_first else 1]
        first, second = slice(0, size), slice(size, n)
        return (first, second) if self._passed_first else (second, first)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._in_order:
            x = x.index_select(self._axis, self._order)
        if self._passed_first:
            passed, value = x.split(self._sizes, self._axis)
        else:
            value, passed = x.split(self._sizes[::-1], self._axis)
        return passed, value.flatten(self._axis)

    def join(self, seen: Tensor, value: Tensor) -> Tensor:
        if len(self.transformed) > 1:
            value = value.unflatten(-1, self.transformed)
        y = torch.cat([seen, value] if self._passed_first else [value, seen], self._axis)
        return y if self._in_order else y.index_select(self._axis, self._inverse_order)


class PixelSplit(Split):
    """Any mask over an image: the network's input is the image with zeros at the elements to transform.

    Its output has parameters for all elements; those of the elements that pass are unused.
    """

    def __init__(self, passes: Sequence[bool], shape: Sequence[int]):
        super().__init__(passes, shape)
        self.seen = self.transformed = tuple(shape)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The map is computed at the elements that pass too, and discarded there: at zero its gradients are finite.
        return torch.where(self.mask, x, 0.0), torch.where(self.mask, 0.0, x).flatten(-3)

    def join(self, seen: Tensor, value: Tensor) -> Tensor:
        return torch.where(self.mask, seen, value.unflatten(-1, self.transformed))

    def total(self, log_slope: Tensor) -> Tensor:
        return torch.where(self.mask.flatten(), 0.0, log_slope).sum(-1)


def make_split(mask: Mask, shape: Sequence[int], flip: bool) -> Split:
    """The split of an event of `shape`; by channel if the mask is by channel."""
    passes = passed_elements(mask, shape, flip)
    step = len(passes) // shape[0]
    by_axis = [p for p in passes[::step] for _ in range(step)]
    return (AxisSplit if by_axis == passes else PixelSplit)(passes, shape)
