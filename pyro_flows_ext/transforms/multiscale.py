"""Multi-scale architectures: parts of an image become latents early, the rest passes through more layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from typing_extensions import Self

from ..ops import check_event, read_event_shape
from .base import IMAGE, FlowTransform
from .context import common_context_dim
from .image import Squeeze

KINDS = ("channel", "checkerboard", "none")


class MultiScale(FlowTransform):
    """z `(*, D)` -> an image `(*, C, H, W)`, D = C H W: level by level, with further latents joining before each.

    The inverse, from image to latents, runs level 1, gives up a share of the result as latents, runs level 2 on the
    rest, and so on; log|det| is the sum over levels, exact. z holds the latents of the last level first, those that
    left after the first level last: the order of nested dropout. Cost: that of the levels.

    Args:
        levels: transforms of images, forward towards the data, the level next to the data first. The image that
            stays after a level, `(C', H / 2, W / 2)`, holds the C' elements that stay of the 4 C in each block of 2 x 2 pixels.
        event_shape: `(C, H, W)`.
        factor_out: the elements that leave after each level but the last: "channel", the last half of the channels
            that `Squeeze` makes; "checkerboard", the pixels with odd h + w; "none"; or for each of those levels a
            boolean mask of its image, True for what leaves, with as many in every block.

    Raises:
        ValueError: if masks or shapes do not fit, or levels expect contexts of different sizes.

    Example:
        >>> levels = [Coupling((1, 4, 4), mask="checkerboard"), Coupling((2, 2, 2))]
        >>> MultiScale(levels, (1, 4, 4))(torch.zeros(5, 16)).shape
        torch.Size([5, 1, 4, 4])

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP, sec. 3.6; masks by likelihood: Das,
        Abbeel & Spanos 2019, Dimensionality Reduction Flows, sec. 3.2.
    """

    domain = constraints.real_vector
    codomain = IMAGE
    levels: Any

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
        self.context_dim = common_context_dim(levels)
        if not isinstance(factor_out, str) and len(factor_out) != len(levels) - 1:
            raise ValueError(
                f"factor_out: expected {len(levels) - 1} masks, one a level but the last, got {len(factor_out)}"
            )
        # The shape of the image behind each level, seen from the data.
        self._shapes: list[torch.Size] = []
        for i in range(len(levels) - 1):
            shape = levels[i].inverse_shape(shape)
            self._shapes.append(shape)
            mask = make_mask(factor_out, shape) if isinstance(factor_out, str) else factor_out[i]
            keep = kept_elements(mask, shape)
            self.register_buffer(f"keep_{i}", keep)
            self.register_buffer(f"leave_{i}", mask.flatten().nonzero().squeeze(-1))
            shape = keep.shape
        self._shapes.append(levels[-1].inverse_shape(shape))

    def condition(self, context: Tensor) -> Self:
        """Returns this transform with all levels at a context `(*, context_dim)`; itself where none depends on one."""
        if not self.context_dim:
            return self
        levels = [level.condition(context) for level in self.levels]
        return self._with_modules(context.shape[:-1], levels=nn.ModuleList(levels))

    @property
    def masks(self) -> list[Tensor]:
        """The elements that leave after each level but the last, as booleans of the image there."""
        masks = []
        for i, shape in enumerate(self._shapes[:-1]):
            mask = torch.zeros(shape.numel(), dtype=torch.bool, device=self._leave(i).device)
            mask[self._leave(i)] = True
            masks.append(mask.reshape(shape))
        return masks

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.event_shape)
        y = y.expand(self._broadcast_shape(y.shape, 3))
        latents: list[Tensor] = []
        total: Any = 0.0
        for i, level in enumerate(self.levels):
            y, ladj = level.inverse_and_ladj(y)
            total = total + ladj
            flat = y.flatten(-3)
            if i == len(self.levels) - 1:
                latents.append(flat)
            else:
                latents.append(flat[..., self._leave(i)])
                y = flat[..., self.kept(i)]
        return torch.cat(latents[::-1], -1), total

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.event_shape.numel())
        x = x.expand(self._broadcast_shape(x.shape, 1))
        size = self._shapes[-1].numel()
        image, rest = x[..., :size].unflatten(-1, self._shapes[-1]), x[..., size:]
        image, total = self.levels[-1].forward_and_ladj(image)
        for i in reversed(range(len(self.levels) - 1)):
            keep, leave = self.kept(i), self._leave(i)
            flat = torch.cat([image.flatten(-3), rest[..., : len(leave)]], -1)
            rest = rest[..., len(leave) :]
            order = torch.cat([keep.flatten(), leave]).argsort()
            image = flat[..., order].unflatten(-1, self._shapes[i])
            image, ladj = self.levels[i].forward_and_ladj(image)
            total = total + ladj
        return image, total

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        batch = self._broadcast_shape(shape, 1)[:-1]
        if shape[-1] != self.event_shape.numel():
            raise ValueError(
                f"{type(self).__name__}: expected vectors of {self.event_shape.numel()}, got shape {tuple(shape)}"
            )
        return batch + self.event_shape

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        if torch.Size(shape[-3:]) != self.event_shape:
            raise ValueError(
                f"{type(self).__name__}.inv: expected images {tuple(self.event_shape)}, got shape {tuple(shape)}"
            )
        return torch.Size((*self._broadcast_shape(shape, 3)[:-3], self.event_shape.numel()))

    @property
    def sign(self) -> int:
        return 0  # the parity of what is moved depends on the masks

    def kept(self, i: int) -> Tensor:
        """Returns the flat positions of the elements that stay after level i, in the shape of the next level's image."""
        return getattr(self, f"keep_{i}")

    def _leave(self, i: int) -> Tensor:
        return getattr(self, f"leave_{i}")

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, levels={len(self.levels)}"


def make_mask(kind: str, shape: Sequence[int]) -> Tensor:
    """Returns a mask by name as booleans `(C, H, W)`, True for elements that leave; `ValueError` for another name or an odd size."""
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
    """Returns the flat positions of the elements that stay, in the shape of their image: `(C', H / 2, W / 2)`.

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
