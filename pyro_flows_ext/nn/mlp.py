"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


class MLP(nn.Sequential):
    """A multilayer perceptron `(*, in_dim) -> (*, out_dim)`; no hidden layers makes it a linear map.

    `zero_last=True` starts the last layer at zero, so that whatever the output parametrises starts at its own
    initial value.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        zero_last: bool = False,
    ):
        layers: list[nn.Module] = []
        for width in hidden_dims:
            layers += [nn.Linear(in_dim, width), activation()]
            in_dim = width
        last = nn.Linear(in_dim, out_dim)
        if zero_last:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
