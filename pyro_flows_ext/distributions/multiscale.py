"""Multi-scale flows over images, with latents that leave by channel, by checkerboard or by their share of the likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from typing_extensions import Self

from ..transforms import (
    ComposeFlow,
    FlowTransform,
    MultiScale,
    Squeeze,
)
from ._contributions import masks_by_share, mean_by_place, pull_with_contributions
from .flow import FlowDistribution

MakeLevel = Callable[[Any], FlowTransform]  # of a shape (C, H, W)


class MultiScaleFlow(FlowDistribution):
    """An exact density of images `(C, H, W)`: levels of flow steps, between which part of the elements become latents.

    The remaining elements pass to the next level, at half the height and width (see `transforms.MultiScale`). The base
    is standard normal on the D = C H W latents, those of the last level first. Architectures: `flows.RealNVPImage`,
    `flows.Glow`, `flows.NSFImage`. Cost: one pass of the levels in either direction.

    Factoring by likelihood takes two steps: train with `factor_out="none"`, take `masks = flow.likelihood_masks(data)`,
    and train `flow.factored(masks)`. Elements with the larger share of the log-det then pass through more levels.

    Args:
        event_shape: (C, H, W).
        make_level: from the shape of its images to the transform of a level, forward towards the data.
        num_levels: number of levels.
        factor_out: "channel", "checkerboard", "none", or a mask for each level but the last; masks are buffers.
        squeeze_first: start with `Squeeze`, for levels that mix channels.

    Raises:
        ValueError: for masks or sizes that do not fit.

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP; factoring by likelihood: Das, Abbeel &
        Spanos 2019, Dimensionality Reduction Flows, sec. 3.2.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        make_level: MakeLevel,
        num_levels: int = 2,
        factor_out: str | Sequence[Tensor] = "channel",
        *,
        squeeze_first: bool = False,
        validate_args: bool | None = None,
    ):
        shape = torch.Size(event_shape)
        if len(shape) != 3:
            raise ValueError(f"event_shape: expected (C, H, W), got {tuple(shape)}")
        if squeeze_first:
            shape = Squeeze().forward_shape(shape)
        shapes = [shape]
        while len(shapes) < num_levels:
            C, H, W = shapes[-1]
            shapes.append(torch.Size([C * (4 if factor_out == "none" else 2), H // 2, W // 2]))
        levels = MultiScale([make_level(tuple(s)) for s in shapes], shape, factor_out)
        transform = ComposeFlow([levels, Squeeze().inv]) if squeeze_first else levels
        base = dist.Normal(torch.zeros(shape.numel()), 1.0).to_event(1)
        super().__init__(base, transform, validate_args=validate_args)
        self._recipe: dict[str, Any] = {"make_level": make_level, "num_levels": num_levels, "squeeze_first": squeeze_first}  # fmt: skip

    @property
    def multiscale(self) -> MultiScale:
        """The levels, with the `masks` of the elements that leave."""
        transform: Any = self.transform
        return transform[0] if isinstance(transform, ComposeFlow) else transform

    def factored(self, factor_out: str | Sequence[Tensor]) -> Self:
        """A new flow of the same architecture, not trained, from which latents leave by `factor_out`.

        Fixed permutations of the channels are those of this flow where sizes agree, as masks refer to what they
        put in each place.
        """
        some = next(self.parameters())
        flow = type(self)(self.event_shape, factor_out=factor_out, **self._recipe)
        if self.standardization is not None:
            flow.standardize(self.standardization.loc, self.standardization.scale)
        own = dict(self.named_buffers())
        for name, buffer in flow.named_buffers():
            if name.endswith(".permutation") and buffer.shape == own[name].shape:
                buffer.copy_(own[name])
        return flow.to(device=some.device, dtype=some.dtype)

    @torch.no_grad()
    def initialize(self, data: Tensor) -> None:
        """Initialises every ActNorm from the moments of its inputs for `data` `(N, C, H, W)`."""
        image = self._enter(data)
        for i, level in enumerate(self.multiscale.levels):
            image = _initialize(level, image)
            if i < len(self.multiscale.masks):
                image = image.flatten(-3)[..., self.multiscale.kept(i)]

    @torch.no_grad()
    def contributions(
        self, data: Tensor, chunk_size: int = 250, *, carry: bool = True
    ) -> list[Tensor]:
        """Mean contribution of each element to the log-det, up to the end of each level.

        A 1x1 convolution contributes its log singular values, divided by the squared entries of the singular vectors,
        and mixes earlier contributions as it mixes the channels.

        Args:
            data: `(N, C, H, W)`.
            chunk_size: rows at a time.
            carry: False assigns the i-th largest singular value to channel i, and keeps earlier contributions in place.

        Returns:
            By level, `(C, H, W)` as the first level's image, in nats, of the map from data to latents.

        Raises:
            ValueError: for another `factor_out` than "none": elements that have left contribute nothing more.
            TypeError: for layers without a log-det by element.
        """
        levels = self.multiscale
        if any(bool(mask.any()) for mask in levels.masks):
            raise ValueError(
                'contributions: expected a flow with factor_out="none"; train flow.factored("none") first'
            )
        totals = [torch.zeros(levels.event_shape.numel()).to(data) for _ in levels.levels]
        for rows in data.split(chunk_size):
            image = self._enter(rows)
            ladj = torch.zeros_like(image)
            origin = torch.arange(image[0].numel(), device=data.device)
            for i, level in enumerate(levels.levels):
                image, ladj = pull_with_contributions(level, image, ladj, carry=carry)
                totals[i][origin.flatten()] += ladj.flatten(-3).sum(0)
                if i < len(levels.masks):
                    keep = levels.kept(i)
                    image, ladj, origin = image.flatten(-3)[..., keep], ladj.flatten(-3)[..., keep], origin.flatten()[keep]  # fmt: skip
        return [total.reshape(levels.event_shape) / len(data) for total in totals]

    def likelihood_masks(
        self, data: Tensor, *, same_places: bool = False, across_channels: bool = False
    ) -> list[Tensor]:
        """Masks for `factored`: of the four elements in a block of a channel, the two of smaller contributions leave.

        Args:
            data: `(N, C, H, W)`; contributions are means over it, since masks by image would not be invertible.
            same_places: take means over the blocks too, so that the same places leave every block. A channel of the
                next level then holds one place, as convolutions expect.
            across_channels: half of all elements of a block leave, as in Glow, whose convolutions distinguish channels.
        """
        shares = self.contributions(data)[:-1]
        if same_places:
            shares = [mean_by_place(share, i) for i, share in enumerate(shares)]
        return masks_by_share(shares, across_channels=across_channels)

    def _enter(self, data: Tensor) -> Tensor:
        """Data in the shape and units of the first level."""
        self._check_value(data)
        data = self._to_layers(data)[0]
        return Squeeze()(data) if self._recipe["squeeze_first"] else data


def _initialize(transform: Any, y: Tensor) -> Tensor:
    """f⁻¹(y); initialises every part that has an `initialize` from its inputs."""
    if isinstance(transform, ComposeFlow):
        for part in reversed(list(transform)):
            y = _initialize(part, y)
        return y
    if hasattr(transform, "initialize"):
        transform.initialize(y, inverse=True)
    return transform.inverse_and_ladj(y)[0]
