"""Multi-scale architectures: parts of an image become latents early, the rest passes through more layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ._constrain import IMAGE, check_event, read_event_shape
from .base import FlowTransform
from .image import Squeeze

KINDS = ("channel", "checkerboard", "none")


class MultiScale(FlowTransform):
    """z `(*, D)` -> an image `(*, C, H, W)`, D = C H W: level by level, with further latents joining before each.

    The inverse, from image to latents, runs level 1, gives up a share of what it has become as latents, runs level 2 on the
    rest, and so on; log|det| is the sum over levels, exact. z holds the latents of the last level first, those that
    left after the first level last: the order of nested dropout.

    `levels`: transforms of images, forward towards the data, the level next to the data first. What stays after a level
    goes on with half the height and width: an image `(C, H, W)` becomes `(C', H / 2, W / 2)`, C' the elements that stay of
    the 4 C in each block of 2 x 2 pixels.
    `factor_out`: what leaves after each level but the last: "channel", the last half of the channels that `Squeeze` makes;
    "checkerboard", the pixels with odd h + w; "none", nothing; or for each of those levels a boolean mask of its image,
    True for what leaves, with as many in every block.

    Cost: that of the levels. Raises `ValueError` for masks or shapes that do not fit.

    Source: Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP, sec. 3.6; masks by likelihood: Das, Abbeel &
    Spanos 2019, Dimensionality Reduction Flows, sec. 3.2.
    """

    domain = constraints.real_vector
    codomain = IMAGE

    def __init__(
        self,
        levels: Sequence[FlowTransform],
        event_shape: Sequence[int],
        factor_out: str | Sequence[Tensor] = "channel",
    ):
        super().__init__()
        shape = read_event_shape(event_shape)
        if len(shape) != 3 or not levels:
            raise ValueError(
                f"levels, event_shape: expected at least one level, and (C, H, W); got {len(levels)} and {tuple(shape)}"
            )
        self.event_shape = shape
        self.levels = nn.ModuleList(levels)
        if not isinstance(factor_out, str) and len(factor_out) != len(levels) - 1:
            raise ValueError(
                f"factor_out: expected {len(levels) - 1} masks, one a level but the last, got {len(factor_out)}"
            )
        for i in range(len(levels) - 1):
            shape = self.levels[i].inverse_shape(shape)  # type: ignore[operator]
            mask = make_mask(factor_out, shape) if isinstance(factor_out, str) else factor_out[i]
            keep = kept_elements(mask, shape)
            self.register_buffer(f"keep_{i}", keep)
            self.register_buffer(f"leave_{i}", mask.flatten().nonzero().squeeze(-1))
            shape = keep.shape
        self.levels[-1].inverse_shape(shape)  # type: ignore[operator]

    @property
    def masks(self) -> list[Tensor]:
        """What leaves after each level but the last, as booleans of the image there."""
        shape, masks = torch.Size(self.event_shape), []
        for i, level in enumerate(self.levels[:-1]):
            shape = level.inverse_shape(shape)  # type: ignore[operator]
            mask = torch.zeros(shape.numel(), dtype=torch.bool, device=self._leave(i).device)
            mask[self._leave(i)] = True
            masks.append(mask.reshape(shape))
            shape = self.kept(i).shape
        return masks

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.event_shape)
        latents, ladjs = [], []
        for i, level in enumerate(self.levels):
            y, ladj = level.inverse_and_ladj(y)  # type: ignore[operator]
            ladjs.append(ladj)
            flat = y.flatten(-3)
            if i == len(self.levels) - 1:
                latents.append(flat)
            else:
                latents.append(flat[..., self._leave(i)])
                y = flat[..., self.kept(i)]
        return torch.cat(latents[::-1], -1), torch.stack(ladjs).sum(0)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.event_shape.numel())
        image, rest, ladjs = None, x, []
        for i in reversed(range(len(self.levels))):
            if image is None:
                shape = self._last_shape()
                image, rest = (
                    rest[..., : shape.numel()].unflatten(-1, shape),
                    rest[..., shape.numel() :],
                )
            else:
                keep, leave = self.kept(i), self._leave(i)
                flat = torch.cat([image.flatten(-3), rest[..., : len(leave)]], -1)
                rest = rest[..., len(leave) :]
                order = torch.cat([keep.flatten(), leave]).argsort()
                image = flat[..., order].unflatten(-1, self._shape_before_split(i))
            image, ladj = self.levels[i].forward_and_ladj(image)  # type: ignore[operator]
            ladjs.append(ladj)
        return image, torch.stack(ladjs).sum(0)  # type: ignore[return-value]

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        self._broadcast_shape(shape, 1)
        if shape[-1] != self.event_shape.numel():
            raise ValueError(
                f"{type(self).__name__}: expected vectors of {self.event_shape.numel()}, got shape {tuple(shape)}"
            )
        return torch.Size(shape[:-1]) + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        if torch.Size(shape[-3:]) != self.event_shape:
            raise ValueError(
                f"{type(self).__name__}.inv: expected images {tuple(self.event_shape)}, got shape {tuple(shape)}"
            )
        return torch.Size((*shape[:-3], self.event_shape.numel()))

    @property
    def sign(self) -> int:
        return 0  # the parity of what is moved depends on the masks

    def kept(self, i: int) -> Tensor:
        """The flat positions of what stays after level i, in the shape of the image that goes on."""
        return getattr(self, f"keep_{i}")  # type: ignore[no-any-return]

    def _leave(self, i: int) -> Tensor:
        return getattr(self, f"leave_{i}")  # type: ignore[no-any-return]

    def _shape_before_split(self, i: int) -> torch.Size:
        shape = self.event_shape if i == 0 else self.kept(i - 1).shape
        return self.levels[i].inverse_shape(shape)  # type: ignore[no-any-return, operator]

    def _last_shape(self) -> torch.Size:
        return self._shape_before_split(len(self.levels) - 1)

    def _state(self) -> list[Tensor]:
        return [t for level in self.levels for t in level._state()] + list(self.buffers())  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, levels={len(self.levels)}"


def make_mask(kind: str, shape: Sequence[int]) -> Tensor:
    """A named mask as booleans `(C, H, W)`, True for what leaves; `ValueError` for another name or an odd size."""
    C, H, W = shape
    if H % 2 or W % 2:
        raise ValueError(
            f"factor_out: expected an image of even height and width at every level but the last, got {tuple(shape)}"
        )
    if kind == "channel":
        late = torch.arange(4 * C) >= 2 * C
        return Squeeze().inverse_and_ladj(late.reshape(-1, 1, 1).expand(4 * C, H // 2, W // 2))[0]
    if kind == "checkerboard":
        odd = (torch.arange(H).unsqueeze(-1) + torch.arange(W)) % 2 == 1
        return odd.expand(C, H, W)
    if kind == "none":
        return torch.zeros(C, H, W, dtype=torch.bool)
    raise ValueError(f"factor_out: expected masks or one of {', '.join(KINDS)}; got {kind!r}")


def kept_elements(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The flat positions of what stays, in the shape of the image that it makes: `(C', H / 2, W / 2)`.

    Raises `ValueError` unless the mask keeps the same number C' > 0 of the 4 C elements in each block of 2 x 2 pixels.
    """
    if mask.shape != torch.Size(shape) or mask.dtype != torch.bool:
        raise ValueError(
            f"factor_out: expected booleans of shape {tuple(shape)}, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    stays, positions = (
        Squeeze().forward_and_ladj(t)[0]
        for t in (~mask, torch.arange(mask.numel(), device=mask.device).reshape(mask.shape))
    )
    counts = stays.sum(0)
    num = int(counts.flatten()[0])
    if num == 0 or bool((counts != num).any()):
        raise ValueError(
            "factor_out: expected a mask that keeps the same number of elements, at least one, in every block of 2 x 2 pixels"
        )
    kept = positions.movedim(0, -1)[stays.movedim(0, -1)]
    return kept.reshape(*counts.shape, num).movedim(-1, 0)


def multiscale(
    levels: Sequence[FlowTransform],
    event_shape: Sequence[int],
    factor_out: str | Sequence[Tensor] = "channel",
) -> MultiScale:
    """Levels with latents that join between them: see `MultiScale`."""
    return MultiScale(levels, event_shape, factor_out)
