"""Networks that emit the parameters of other modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .mlp import MLP


class HyperNetwork(nn.Module):
    """Maps a context `(*, C)` to named tensors `(*, shape)`, all zero before training.

    One multilayer perceptron emits every entry of every tensor, so its last layer has as many rows as there are entries.

    Args:
        context_dim: C.
        shapes: name -> shape of the tensors.
        hidden_dims: widths of the hidden layers; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: in a pass, if the last dimension of the context is not C.

    Example:
        >>> HyperNetwork(2, {"loc": (3,)})(torch.ones(5, 2))["loc"].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        context_dim: int,
        shapes: Mapping[str, Sequence[int]],
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        self.context_dim = context_dim
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]
        hidden_dims = (64, 64) if hidden_dims is None else hidden_dims
        self.net = MLP(context_dim, sum(self.sizes), hidden_dims, zero_last=True)

    def forward(self, context: Tensor) -> dict[str, Tensor]:
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"context: expected shape (*, {self.context_dim}), got {tuple(context.shape)}"
            )
        parts = self.net(context).split(self.sizes, dim=-1)
        return {
            name: part.reshape(context.shape[:-1] + shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
