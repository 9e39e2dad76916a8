"""Convolutional networks that keep height and width: conditioners for images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import broadcast_shapes


class ResidualConvNet(nn.Module):
    """A residual network `(*, in_channels, H, W) -> (*, out_channels, H, W)`, for any H and W, padded with zeros.

    A 3x3 convolution to `hidden_channels`, then `num_blocks` times h + conv1x1(act(conv3x3(act(h)))), then an activation
    and a 3x3 convolution. An output depends on the pixels up to num_blocks + 2 away. Nothing is normalised across images.

    Args:
        in_channels, out_channels: numbers of channels.
        hidden_channels: width of the blocks.
        num_blocks: number of blocks.
        context_dim: size of a context `(*, context_dim)` that is joined to x as channels that are constant over the
            image: `forward(x, context)`.
        activation: makes the activations.
        zero_last: whether the last convolution starts at zero.

    Raises:
        ValueError: in a pass, for another number of channels.

    Example:
        >>> ResidualConvNet(1, 4, hidden_channels=8)(torch.zeros(5, 1, 6, 6)).shape
        torch.Size([5, 4, 6, 6])

    References:
        He et al. 2016, Identity Mappings in Deep Residual Networks (blocks with the activation first).
    """

    gated = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 32,
        num_blocks: int = 2,
        *,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.ReLU,
        zero_last: bool = True,
    ):
        super().__init__()
        self.joined_channels = in_channels + context_dim
        last = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        if zero_last:
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.net = nn.Sequential(
            nn.Conv2d(self.joined_channels, hidden_channels, 3, padding=1),
            *(_Block(hidden_channels, activation, self.gated) for _ in range(num_blocks)),
            activation(),
            last,
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = join_channels(x, context)
        if x.dim() < 3 or x.shape[-3] != self.joined_channels:
            raise ValueError(
                f"x: expected shape (*, {self.joined_channels}, H, W), with the channels of the context, got {tuple(x.shape)}"
            )
        batch, image = x.shape[:-3], x.shape[-3:]
        y = self.net(x.reshape(math.prod(batch), *image))
        return y.reshape(*batch, *y.shape[1:])


class GatedConvNet(ResidualConvNet):
    """A `ResidualConvNet` of gated blocks: h + a ⊙ σ(b), with (a, b) = conv1x1(act(conv3x3(act(h)))).

    Example:
        >>> GatedConvNet(1, 4, hidden_channels=8)(torch.zeros(1, 6, 6)).shape
        torch.Size([4, 6, 6])

    References:
        Ho et al. 2019, Flow++.
    """

    gated = True


class _Block(nn.Module):
    def __init__(self, channels: int, activation: Callable[[], nn.Module], gated: bool):
        super().__init__()
        self.gated = gated
        self.net = nn.Sequential(
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
            activation(),
            nn.Conv2d(channels, (1 + gated) * channels, 1),
        )

    def forward(self, h: Tensor) -> Tensor:
        change = self.net(h)
        if self.gated:
            change, gate = change.chunk(2, -3)
            change = change * gate.sigmoid()
        return h + change


def convnet(
    in_channels: int, out_channels: int, hidden_dims: Sequence[int] | None, **options: Any
) -> ResidualConvNet:
    """Returns a `ResidualConvNet` with a block for each of `hidden_dims`, all equal: `(32, 32)` by default."""
    widths = (32, 32) if hidden_dims is None else tuple(hidden_dims)
    if len(set(widths)) != 1:
        raise ValueError(
            f"hidden_dims: expected equal numbers of channels for images, one a residual block, got {widths}"
        )
    return ResidualConvNet(in_channels, out_channels, widths[0], len(widths), **options)


def join_channels(x: Tensor, context: Tensor) -> Tensor:
    """x `(*, D, H, W)` and context `(*, C)`, broadcast and joined as constant channels: `(*, D + C, H, W)`."""
    batch = broadcast_shapes(x.shape[:-3], context.shape[:-1])
    constant = context[..., None, None].expand(*batch, -1, *x.shape[-2:])
    return torch.cat([x.expand(*batch, -1, -1, -1), constant], -3)
