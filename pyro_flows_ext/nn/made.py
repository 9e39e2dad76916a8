"""Masked autoregressive networks: the parameters of variable i from the variables before it, for all i in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.perceptron import is_worthwhile, perceptron
from .mlp import check_context, known_activation


class MADE(nn.Module):
    """θ_i = net_i(x_j for all j before i; c): maps x `(*, D)` to parameters `(*, P, D)`, all zero before training.

    Every hidden unit reads the first m variables for some m, its degree; the degrees of a layer are spread evenly from 1
    (0 with a context) to D - 1, so that a layer narrower than D leaves some dependences out. For D = 1 the parameters do
    not depend on x. Masks are buffers, so that a `state_dict` holds the order. Cost: one pass of a perceptron.

    Args:
        input_dim: D.
        num_params: P.
        hidden_dims: widths of the hidden layers; two of max(64, 2D) by default.
        order: `order[k]` is the variable that comes k-th; 0, 1, ..., D - 1 by default.
        context_dim: size of a context `(*, C)` that all units read, broadcast against x: `forward(x, context)`.
        activation: makes the activation.
        residual: whether a hidden layer as wide as the one before it is added to it.

    Raises:
        ValueError: if `order` is not a permutation, or a context is missing, superfluous or of another size.

    Example:
        >>> MADE(3, 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2, 3])

    References:
        Germain, Gregor, Murray & Larochelle 2015, MADE: Masked Autoencoder for Distribution Estimation; residual
        connections as in Nash & Durkan 2019, Autoregressive Energy Machines.
    """

    order: Tensor

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        order: Sequence[int] | None = None,
        context_dim: int = 0,
        activation: Callable[[], nn.Module] = nn.Tanh,
        residual: bool = True,
    ):
        super().__init__()
        D = input_dim
        order = list(range(D)) if order is None else [int(i) for i in order]
        if sorted(order) != list(range(D)):
            raise ValueError(f"order: expected a permutation of 0, ..., {D - 1}, got {order}")
        hidden_dims = (max(64, 2 * D),) * 2 if hidden_dims is None else hidden_dims
        self.num_params, self.context_dim, self.residual = num_params, context_dim, residual
        self.register_buffer("order", torch.tensor(order))

        position = self.order.argsort()
        # Without a context, a unit without inputs would be a constant.
        lowest = 0 if context_dim or D == 1 else 1
        layers: list[MaskedLinear] = []
        degrees = position + 1
        for width in hidden_dims:
            next_degrees = lowest + torch.arange(width) * (D - lowest) // width
            layers.append(MaskedLinear(degrees, next_degrees))
            degrees = next_degrees
        layers.append(MaskedLinear(degrees, position.repeat(num_params)))
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)
        self.activation = activation()
        self.context_layer = None
        if context_dim:
            self.context_layer = nn.Linear(context_dim, layers[0].out_features, bias=False)
            if len(layers) == 1:  # the first is the last
                nn.init.zeros_(self.context_layer.weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.bind(context)(x)

    def bind(self, context: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Returns the network at a context as a function of x; masks and context are applied once, for many calls."""
        check_context(context, self.context_dim)
        (first, shift), *rest = self._masked()
        if context is not None:
            shift = F.linear(context, self.context_layer.weight, shift)  # type: ignore[union-attr]

        def run(x: Tensor) -> Tensor:
            if is_worthwhile(x, len(first)) and (known := known_activation(self.activation)):
                weights, biases = zip((first, shift), *rest, strict=True)
                h = perceptron(x, weights, biases, known, residual=self.residual)
                return h.unflatten(-1, (self.num_params, -1))
            h = F.linear(x, first, shift) if context is None else F.linear(x, first) + shift
            if rest:
                h = self.activation(h)
            for weight, bias in rest[:-1]:
                a = self.activation(F.linear(h, weight, bias))
                # Equal widths have equal degrees.
                h = h + a if self.residual and a.shape[-1] == h.shape[-1] else a
            if rest:
                h = F.linear(h, *rest[-1])
            # Parameters before variables: an operation on one parameter of all variables then has contiguous memory.
            return h.unflatten(-1, (self.num_params, -1))

        return run

    def _masked(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of every layer."""
        return [(layer.masked_weight(), layer.bias) for layer in self.layers]  # type: ignore[misc, operator]


class MaskedLinear(nn.Linear):
    """A linear map in which output o depends on input i if `out_degrees[o] >= in_degrees[i]`."""

    mask: Tensor

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor):
        super().__init__(len(in_degrees), len(out_degrees))
        mask = out_degrees.unsqueeze(-1) >= in_degrees
        # As numbers, since the product of a float and a boolean tensor takes six times as long.
        self.register_buffer("mask", mask.to(self.weight.dtype))

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked_weight(), self.bias)
