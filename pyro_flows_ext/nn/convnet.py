"""Convolutional networks that keep height and width: conditioners for images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class ResidualConvNet(nn.Module):
    """A residual network `(*, in_channels, H, W) -> (*, out_channels, H, W)`, for any H and W, padded with zeros.

    A 3x3 convolution to `hidden_channels`, then `num_blocks` times h + conv1x1(act(conv3x3(act(h)))), then an activation
    and a 3x3 convolution, which `zero_last=True` starts at zero: whatever the output parametrises starts at its own
    initial value. An output sees the pixels up to num_blocks + 2 away. Nothing is normalised, and images do
    not see each other.

    With `context_dim`, `forward(x, context)` takes a context `(*, context_dim)` beside x, broadcast against it and joined
    as channels that are constant over the image. Raises `ValueError` for another number of channels.

    Source: residual blocks with the activation first, He et al. 2016, Identity Mappings in Deep Residual Networks.
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
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]
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

    Source: Ho et al. 2019, Flow++.
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


def join_channels(x: Tensor, context: Tensor) -> Tensor:
    """x `(*, D, H, W)` and context `(*, C)`, broadcast and joined as constant channels: `(*, D + C, H, W)`."""
    batch = torch.broadcast_shapes(x.shape[:-3], context.shape[:-1])
    constant = context[..., None, None].expand(*batch, -1, *x.shape[-2:])
    return torch.cat([x.expand(*batch, -1, -1, -1), constant], -3)
