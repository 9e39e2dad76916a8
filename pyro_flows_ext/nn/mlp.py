"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import broadcast_shapes, fused
from ..ops.perceptron import RELU, SIGMOID, TANH, Activation, is_worthwhile, perceptron


class MLP(nn.Sequential):
    """A multilayer perceptron `(*, in_dim) -> (*, out_dim)`, with an optional context: `forward(x, context)`.

    Args:
        in_dim, out_dim: sizes of the input and the output.
        hidden_dims: widths of the hidden layers; `()` for a linear map.
        activation: makes the activations.
        context_dim: size of a context `(*, context_dim)` that is joined to x, broadcast against it.
        zero_last: whether the last layer starts at zero, and with it the parameters that are its output.

    Example:
        >>> MLP(3, 2, context_dim=1)(torch.zeros(5, 3), torch.zeros(1)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: int = 0,
        zero_last: bool = False,
    ):
        width = in_dim + context_dim
        layers: list[nn.Module] = []
        for next_width in hidden_dims:
            layers += [nn.Linear(width, next_width), activation()]
            width = next_width
        last = nn.Linear(width, out_dim)
        if zero_last:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
        self.width = int(hidden_dims[0]) if hidden_dims else out_dim

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = join_context(x, context)
        # Written out, and not a call: small networks notice one.
        is_large = x.numel() * self.width >= fused.MIN_NUMEL * x.shape[-1]
        if is_large and (layers := plain_layers(self)) is not None:
            return perceptron(x, *layers)
        return super().forward(x)


class AngleMLP(MLP):
    """An `MLP` of the cosines and sines of angles `(*, num_angles)`, then of a context: periodic in every angle.

    Args:
        num_angles: the number of angles, which come before the context in the input.
        out_dim, hidden_dims, activation, context_dim, zero_last: as in `MLP`.

    Example:
        >>> from pyro_flows_ext.nn import AngleMLP
        >>> net, x = AngleMLP(2, 3), torch.randn(5, 2)
        >>> torch.allclose(net(x), net(x + 2 * torch.pi), atol=1e-5)
        True
    """

    def __init__(self, num_angles: int, out_dim: int, *args: Any, **options: Any):
        super().__init__(2 * num_angles, out_dim, *args, **options)
        self.num_angles = num_angles

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            x = join_context(x, context)
        angles, rest = x[..., : self.num_angles], x[..., self.num_angles :]
        return super().forward(torch.cat([angles.cos(), angles.sin(), rest], -1))


class ResidualMLP(MLP):
    """An `MLP` in which a hidden layer as wide as the one before it is added to it: h + act(linear(h)).

    Example:
        >>> ResidualMLP(3, 2, (8, 8, 8))(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = x if context is None else join_context(x, context)
        if is_worthwhile(h, self.width) and (layers := plain_layers(self)) is not None:
            return perceptron(h, *layers, residual=True)
        *hidden, last = self
        for i, (linear, activation) in enumerate(zip(hidden[::2], hidden[1::2], strict=True)):
            a = activation(linear(h))
            h = h + a if i and a.shape[-1] == h.shape[-1] else a
        return last(h)


def plain_layers(net: MLP) -> tuple[list[Tensor], list[Tensor], Activation] | None:
    """Weights, biases and the activation of a network that is as its class made it; None with hooks or other modules."""
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    activation = None
    for i, part in enumerate(net._modules.values()):
        if has_hooks(part):
            return None
        if i % 2 == 0 and type(part) is nn.Linear:
            weights.append(part.weight)
            biases.append(part.bias)
            continue
        found = _ACTIVATIONS.get(type(part)) if i % 2 else None
        if found is None or activation not in (None, found):
            return None
        activation = found
    return None if activation is None else (weights, biases, activation)


# The activations of `ops.perceptron`, by module.
_ACTIVATIONS: dict[type, Activation] = {nn.ReLU: RELU, nn.Tanh: TANH, nn.Sigmoid: SIGMOID}


def known_activation(module: nn.Module) -> Activation | None:
    """The activation of a module as a function; None for a module with hooks, or of another kind."""
    return None if has_hooks(module) else _ACTIVATIONS.get(type(module))


def has_hooks(module: Any) -> bool:
    """Whether calls of the module run more than its `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def join_context(x: Tensor, context: Tensor) -> Tensor:
    """x `(*, D)` and context `(*, C)`, broadcast and joined: `(*, D + C)`."""
    batch = broadcast_shapes(x.shape[:-1], context.shape[:-1])
    return torch.cat([x.expand(*batch, -1), context.expand(*batch, -1)], -1)


def check_context(context: Tensor | None, context_dim: int) -> None:
    """Raises `ValueError` unless there is a context `(*, context_dim)`, or with `context_dim` 0 none."""
    if (context is None) != (context_dim == 0):
        expected = f"a tensor of shape (*, {context_dim})" if context_dim else "none"
        raise ValueError(
            f"context: expected {expected}, got {'none' if context is None else 'one'}"
        )
    if context is not None and context.shape[-1:] != (context_dim,):
        raise ValueError(
            f"context: expected a tensor of shape (*, {context_dim}), got {tuple(context.shape)}"
        )
