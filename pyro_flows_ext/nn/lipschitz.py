"""Networks whose Lipschitz constant is bounded for any parameter values."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import conv_norm_bound
from .mlp import check_context

# max |d/dz (z σ(z))| = 1.0998...
_SWISH_SLOPE = 1.1


class LipSwish(nn.Module):
    """z σ(β z) / 1.1 elementwise, β = softplus(parameter) > 0: smooth, not monotone, of slope 1 at most for any β.

    Example:
        >>> LipSwish()(torch.zeros(2)).tolist()
        [0.0, 0.0]

    References:
        Chen, Behrmann, Duvenaud & Jacobsen 2019, Residual Flows for Invertible Generative Modeling, section 3.3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * (F.softplus(self.raw_beta) * x).sigmoid() / _SWISH_SLOPE

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the value and its derivative, `(*)` each."""
        z = F.softplus(self.raw_beta) * x
        s = z.sigmoid() / _SWISH_SLOPE
        return x * s, s + z * s * (1 - _SWISH_SLOPE * s)


class SlopedActivation(Protocol):
    """An activation with its slope, which must lie in [-1, 1]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def value_and_slope(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class BoundLipschitz:
    """A Lipschitz network at a context, as a function of x alone, with its weights scaled once for many calls."""

    def __init__(
        self,
        layers: Sequence[Callable[[Tensor], Tensor]],
        biases: Sequence[Tensor],
        activations: Sequence[SlopedActivation],
    ):
        self.layers, self.biases, self.activations = layers, biases, activations

    def __call__(self, x: Tensor) -> Tensor:
        h = self.layers[0](x) + self.biases[0]
        for activation, layer, bias in zip(
            self.activations, self.layers[1:], self.biases[1:], strict=True
        ):
            h = layer(activation(h)) + bias
        return h

    def linearize(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """g(x), and V -> J V for vectors `(K, *, event)` or broadcast against x: one pass each, by the chain rule."""
        h = self.layers[0](x) + self.biases[0]
        slopes = []
        for activation, layer, bias in zip(
            self.activations, self.layers[1:], self.biases[1:], strict=True
        ):
            a, slope = activation.value_and_slope(h)
            slopes.append(slope)
            h = layer(a) + bias

        def product(V: Tensor) -> Tensor:
            V = self.layers[0](V)
            for slope, layer in zip(slopes, self.layers[1:], strict=True):
                V = layer(slope * V)
            return V

        return h, product


class LipschitzNet(nn.Module, ABC):
    """A chain of linear maps and activations of slope 1 at most, with the norms of the maps bounded by c each. Abstract.

    Lip(g) <= c^(number of maps) = `lipschitz` in the Euclidean norm, for any parameter values: each weight W is used as
    W min(1, c / ‖W‖). The gradient has a kink where ‖W‖ = c, and stays finite with tied singular values and at W = 0.
    Nothing is stored between passes: the norm is that of the present weight. A context `(*, C)` shifts the first layer's
    units, linearly and without a bound. The last layer starts at zero.

    Raises:
        ValueError: unless 0 < lipschitz < 1, or if a context is missing, superfluous or of another size.
    """

    layers: Any
    activations: Any
    context_layer: Any

    def __init__(
        self,
        layers: Sequence[nn.Module],
        lipschitz: float,
        activation: Callable[[], nn.Module],
        context_dim: int,
    ):
        super().__init__()
        if not 0 < lipschitz < 1:
            raise ValueError(
                f"lipschitz: expected a number between 0 and 1, exclusive, got {lipschitz!r}"
            )
        self.lipschitz, self.context_dim = float(lipschitz), context_dim
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList([activation() for _ in layers[1:]])
        first, last = self.layers[0], self.layers[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.context_layer = None
        if context_dim:
            units: int = first.weight.shape[0]
            self.context_layer = nn.Linear(context_dim, units, bias=False)
            if first is last:
                nn.init.zeros_(self.context_layer.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.bind(context)(x)

    def bind(self, context: Tensor | None = None) -> BoundLipschitz:
        """Returns the network at a context as a function of x, with its Jacobian products."""
        check_context(context, self.context_dim)
        c = self.lipschitz ** (1 / len(self.layers))
        layers, biases = [], []
        for layer in self.layers:
            weight: Tensor = layer.weight
            norm = self._norm(weight)
            layers.append(self._linear(weight * (c / norm.clamp_min(c))))
            biases.append(self._per_unit(layer.bias))
        if context is not None:
            biases[0] = biases[0] + self._per_unit(self.context_layer(context))
        return BoundLipschitz(layers, biases, list(self.activations))

    @abstractmethod
    def _norm(self, weight: Tensor) -> Tensor:
        """The operator norm of a layer, or an upper bound."""

    @abstractmethod
    def _linear(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The linear map of a weight, on any number of batch dimensions."""

    def _per_unit(self, values: Tensor) -> Tensor:
        """One number a unit `(*, H)` in the shape that broadcasts against the layer's output."""
        return values


class LipschitzMLP(LipschitzNet):
    """A multilayer perceptron `(*, D) -> (*, D)` of Lipschitz constant <= `lipschitz`: see `LipschitzNet`.

    Norms are exact: a singular value decomposition a layer and call of `bind`, O(min(m, n)² max(m, n)) for a weight m x n.

    Args:
        dim: D.
        hidden_dims: widths of the hidden layers; two of max(64, 2D) by default.
        lipschitz: the bound, in (0, 1).
        activation: makes modules with `forward` and `value_and_slope`, of slopes in [-1, 1].
        context_dim: size of a context: `forward(x, context)`.

    Example:
        >>> LipschitzMLP(3, (8,))(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        lipschitz: float = 0.97,
        activation: Callable[[], nn.Module] = LipSwish,
        context_dim: int = 0,
    ):
        hidden_dims = (max(64, 2 * dim),) * 2 if hidden_dims is None else hidden_dims
        widths = [dim, *hidden_dims, dim]
        layers = [nn.Linear(m, n) for m, n in itertools.pairwise(widths)]
        super().__init__(layers, lipschitz, activation, context_dim)

    def _norm(self, weight: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(weight, 2)

    def _linear(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.linear(x, weight)


class LipschitzConvNet(LipschitzNet):
    """A convolutional network `(*, C, H, W) -> (*, C, H, W)` of Lipschitz constant <= `lipschitz`: see `LipschitzNet`.

    Stride 1, zero padding. The bound on the norms comes from above, loose on a few pixels and tight on many
    (`ops.conv_norm_bound`): H W / 2 products of 2C x 2C matrices a layer and call of `bind`; norms of 1 x 1
    convolutions are exact.

    Args:
        channels: C.
        hidden_channels: widths of the hidden layers; `(64, 64)` by default.
        image_size: (H, W).
        lipschitz: the bound, in (0, 1).
        kernel_sizes: odd sizes, one a layer; by default 3 for the first and the last and 1 between, as in Behrmann et al.
            2019: these two have C channels on one side, where the bound is cheap at any width.
        activation, context_dim: as in `LipschitzMLP`.

    Raises:
        ValueError: for even or too many kernel sizes.

    Example:
        >>> LipschitzConvNet(1, (4,), (6, 6))(torch.zeros(5, 1, 6, 6)).shape
        torch.Size([5, 1, 6, 6])
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: Sequence[int] | None = None,
        image_size: Sequence[int] = (32, 32),
        *,
        lipschitz: float = 0.97,
        kernel_sizes: Sequence[int] | None = None,
        activation: Callable[[], nn.Module] = LipSwish,
        context_dim: int = 0,
    ):
        hidden_channels = (64, 64) if hidden_channels is None else hidden_channels
        widths = [channels, *hidden_channels, channels]
        num_layers = len(widths) - 1
        if kernel_sizes is None:
            kernel_sizes = [3 if i in (0, num_layers - 1) else 1 for i in range(num_layers)]
        if len(kernel_sizes) != num_layers or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(
                f"kernel_sizes: expected {num_layers} odd numbers, got {list(kernel_sizes)}"
            )
        layers = [
            nn.Conv2d(m, n, k) for m, n, k in zip(widths, widths[1:], kernel_sizes, strict=False)
        ]
        super().__init__(layers, lipschitz, activation, context_dim)
        self.image_size = tuple(image_size)

    def _norm(self, weight: Tensor) -> Tensor:
        if weight.shape[-1] == 1:
            return torch.linalg.matrix_norm(weight.flatten(1), 2)
        return conv_norm_bound(weight, self.image_size)

    def _linear(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        padding = weight.shape[-1] // 2

        def conv(x: Tensor) -> Tensor:
            if x.dim() <= 4:
                return F.conv2d(x, weight, padding=padding)
            y = F.conv2d(x.flatten(0, -4), weight, padding=padding)
            return y.unflatten(0, x.shape[:-3])

        return conv

    def _per_unit(self, values: Tensor) -> Tensor:
        return values[..., None, None]
