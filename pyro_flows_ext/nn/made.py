"""Masked autoregressive networks: the parameters of variable i from the variables before it, for all i in one pass."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.fused import may_fuse
from ..ops.perceptron import Activation, is_worthwhile, perceptron
from .mlp import check_context, known_activation
from .substitution import Solve, substitute

# Parameters of one variable in all rows below which substitution, which calls torch some ten times for each variable, takes
# longer than passes over all variables at once.
MIN_PARAMS = 512


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
    context_layer: nn.Linear | None

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
        # For the input and every layer, how many units are known before step k, by which k - 1 variables or more are used.
        self._begins = [[0, *range(D)]]
        for width in hidden_dims:
            spread = [lowest + j * (D - lowest) // width for j in range(width)]
            self._begins.append([0, *(bisect_right(spread, k) for k in range(D))])
            next_degrees = torch.tensor(spread)
            layers.append(MaskedLinear(degrees, next_degrees))
            degrees = next_degrees
        self._begins.append([num_params * k for k in range(D + 1)])
        layers.append(MaskedLinear(degrees, position.repeat(num_params)))
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)
        self.width = layers[0].out_features
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
        if self.context_layer is not None and context is not None:
            shift = F.linear(context, self.context_layer.weight, shift)

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

    def layers_at(
        self, context: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Activation, bool, Tensor, list[int] | None] | None:
        """Weights, biases, activation and `residual`, for `ops.perceptron`; None for other activations.

        Then the order of the variables, and how many units of the last hidden layer the first 0, 1, ... of
        them read, None without a hidden layer.
        """
        check_context(context, self.context_dim)
        known = known_activation(self.activation)
        if known is None:
            return None
        weights, biases = map(list, zip(*self._masked(), strict=True))
        if context is not None:
            biases[0] = F.linear(context, self.context_layer.weight, biases[0])  # type: ignore[union-attr]
        reach = self._begins[-2] if len(weights) > 1 else None
        return weights, biases, known, self.residual, self.order, reach

    def substitute(
        self, y: Tensor, solve: Solve, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Returns x with x_i = solve(y_i, θ_i) for θ_i of the x before i, and Σ log-slopes, in half a pass of the network.

        Args:
            y: `(*, D)`.
            solve: y `(R)`, θ `(P, R)` -> x and a log-slope `(R)`, for R rows of one variable.
            context: `(*, C)`, broadcast against y.

        Returns:
            x `(*, D)` and the sum `(*)`, without a graph. None for few rows, on devices other than CPUs, under `torch.func`
            and autocast, and with other activations than ReLU, tanh and sigmoid: passes over all variables do there.
        """
        check_context(context, self.context_dim)
        batch = y.shape[:-1]
        if context is not None:
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
        activation = known_activation(self.activation)
        weights: list[Any] = [layer.weight for layer in self.layers]
        biases: list[Any] = [layer.bias for layer in self.layers]
        if (
            activation is None
            or batch.numel() * self.num_params < MIN_PARAMS
            or y.device.type != "cpu"
            or not may_fuse(y, *weights, *([] if context is None else [context]))
        ):
            return None
        with torch.no_grad():
            if context is not None:
                shift = F.linear(context, self.context_layer.weight, biases[0])  # type: ignore[union-attr]
                biases[0] = _columns(shift, batch) if shift.dim() > 1 else shift
            biases = [bias.unsqueeze(-1) if bias.dim() == 1 else bias for bias in biases]
            weights[0] = weights[0].index_select(1, self.order)
            weights[-1], biases[-1] = map(self._by_variable, (weights[-1], biases[-1]))
            x, total = substitute(
                _columns(y, batch).index_select(0, self.order),
                weights,
                biases,
                self._begins,
                activation.apply_,
                solve,
                residual=self.residual,
            )
            x = x.index_select(0, self.order.argsort()).t().reshape(*batch, -1)
        return x, total.reshape(batch)

    def _by_variable(self, rows: Tensor) -> Tensor:
        """Rows by parameter and then by variable, put in the order of the variables and then by parameter."""
        rows = rows.unflatten(0, (self.num_params, -1)).index_select(1, self.order)
        return rows.transpose(0, 1).flatten(0, 1)

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


def _columns(t: Tensor, batch: torch.Size) -> Tensor:
    """t `(*, n)` with a batch that broadcasts against `batch`, as `(n, R)`."""
    return t.expand(*batch, -1).reshape(-1, t.shape[-1]).t().contiguous()
