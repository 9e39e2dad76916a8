"""Coupling layers: additive (NICE), affine (RealNVP), rational-quadratic (Neural Spline Flows), or by any elementwise map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from ..nn import MLP
from ..nn.convnet import convnet, join_channels
from ..nn.mlp import has_hooks, join_context, plain_layers
from ..ops import broadcast_shapes, check_context_dim, fused, read_event_shape
from ._split import AxisSplit, make_split
from .base import IMAGE, FlowTransform
from .fused_affine import Network
from .masks import Mask
from .transformers import IN_ONE, Transformer, check_transformer


class CouplingOptions(TypedDict, total=False):
    """Keywords of coupling layers: see `Coupling`."""

    mask: Mask
    flip: bool
    net: nn.Module | None
    activation: Callable[[], nn.Module]


class Coupling(FlowTransform):
    """y_i = x_i where the mask is true, y_i = g(x_i; θ_i) elsewhere, with θ = net(x where the mask is true; c).

    log|det| = Σ_i log g'(x_i; θ_i), exact: the Jacobian is triangular. One layer leaves what it passes untouched:
    alternate `flip`, or permute, from layer to layer. Cost: one pass of the network, the same in both directions.

    Args:
        input_dim: D for events `(*, D)`, `(C, H, W)` for images.
        hidden_dims: widths of the default network, an `nn.MLP` (`(64, 64)`) or, for images, an `nn.ResidualConvNet`
            with one block for each entry, all equal (`(32, 32)`). Its last layer starts at zero, and the transform at g(·; 0).
        transformer: g; `Affine()` by default. See `Transformer`.
        mask: True for the elements that pass: booleans of the shape of the event, "half" (the first D // 2) or
            "alternating" (0, 2, 4, ...); for images these two are by channel, and "checkerboard" by pixel.
        flip: swaps the two roles.
        net: a module `(*, passed + context_dim) -> (*, P · transformed)` in place of the default: the first
            parameter of every θ_i, then the second, and so on. For images it maps channels; with a mask that is not
            by channel, its input has zeros at the elements to transform, and its output for the rest is ignored.
        activation: of the default network.
        context_dim: number of context variables that the network reads.

    Raises:
        ValueError: if the mask passes or transforms nothing, if an input or the output of `net` has another shape,
            or on loading a `state_dict` with another mask.
        TypeError: if `transformer` is not a `Transformer`.

    Example:
        >>> layer = Coupling(4, (32,), transformer=RationalQuadratic(num_bins=8), context_dim=2)
        >>> layer.condition(torch.zeros(5, 2)).forward_and_ladj(torch.zeros(5, 4))[0].shape
        torch.Size([5, 4])

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP; Durkan et al. 2019, Neural Spline Flows.
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_dims: Sequence[int] | None = None,
        *,
        transformer: Transformer | None = None,
        mask: Mask = "half",
        flip: bool = False,
        net: nn.Module | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__()
        self.event_shape = shape = read_event_shape(input_dim)
        self.input_dim = shape[0] if len(shape) == 1 else tuple(shape)
        self.context_dim = check_context_dim(context_dim)
        self.transformer = check_transformer(transformer)
        self._kind = (mask if isinstance(mask, str) else "custom", flip)
        self.split = make_split(mask, self.event_shape, flip)
        num_params = self.transformer.num_params
        n, *pixels = self.split.transformed
        self._theta_shape = (num_params * n, *pixels)
        if net is not None and hidden_dims is not None:
            raise ValueError(
                "hidden_dims: these belong to the default network; give them or net, not both"
            )
        if net is None:
            make_net = _mlp if len(self.event_shape) == 1 else convnet
            net = make_net(
                self.split.seen[0],
                num_params * n,
                hidden_dims,
                activation=activation,
                context_dim=self.context_dim,
                zero_last=True,
            )
        self.net = net
        # That of the network, where the layer may run as one operation.
        self._width = 0
        if type(net) is MLP and type(self.transformer) in IN_ONE and not pixels:
            self._width = net.width

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        # Written out, and not a call: small networks notice one.
        if x.numel() * self._width >= fused.MIN_NUMEL * x.shape[-1]:
            found = self._as_one(x, inverse=False)
            if found is not None:
                return found
        seen, value, log_slope = self.by_element(x, inverse=False)
        return self.split.join(seen, value), self.split.total(log_slope)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        if y.numel() * self._width >= fused.MIN_NUMEL * y.shape[-1]:
            found = self._as_one(y, inverse=True)
            if found is not None:
                return found
        seen, value, log_slope = self.by_element(y, inverse=True)
        return self.split.join(seen, value), self.split.total(log_slope)

    def _as_one(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor] | None:
        """An affine or spline layer with a plain network in one operation; None for others."""
        net, split = self.net, self.split
        if (
            type(self.transformer) not in IN_ONE
            or type(net) is not MLP
            or not isinstance(split, AxisSplit)
            or self.context is not None
            or has_hooks(net)
            or split.columns is None
        ):
            return None
        layers = plain_layers(net)
        if layers is None or len(layers[0][-1]) != self._theta_shape[0]:
            return None
        return self.transformer.layer(x, split.columns, Network(*layers), inverse=inverse)

    def by_element(self, x: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what passes, the other N elements after g or g⁻¹, and their log-slopes, both `(*, N)`."""
        axis, context = -len(self.event_shape), self.context
        if context is not None:
            batch = broadcast_shapes(x.shape[:axis], context.shape[:-1])
            x = x.expand(*batch, *self.event_shape)
        seen, value = self.split.split(x)
        if context is None:
            theta = self.net(seen)
        else:
            theta = self.net((join_context if axis == -1 else join_channels)(seen, context))
        if theta.shape[axis:] != self._theta_shape:
            raise ValueError(
                f"net: expected an output of shape (*, {', '.join(map(str, self._theta_shape))}), that is "
                f"{self.transformer.num_params} parameters for each of {self.split.transformed[0]} transformed elements "
                f"or channels, got {tuple(theta.shape)}"
            )
        theta = theta.flatten(axis).unflatten(-1, (self.transformer.num_params, -1))
        g = self.transformer.inverse if inverse else self.transformer.forward
        return seen, *g(value, theta)

    @property
    def mask(self) -> Tensor:
        """True for the elements that pass: booleans of the shape of the event."""
        return self.split.mask

    @constraints.dependent_property
    def domain(self) -> Constraint:
        """Vectors or images of elements of the transformer's domain."""
        domain, event_dim = self.transformer.domain, len(self.event_shape)
        if domain is constraints.real:
            return constraints.real_vector if event_dim == 1 else IMAGE
        return constraints.independent(domain, event_dim)

    codomain = domain

    def extra_repr(self) -> str:
        name, flip = self._kind
        flipped = ", flip=True" if flip else ""
        return f"{self.input_dim}, transformer={self.transformer!r}, mask={name!r}{flipped}"


def _mlp(in_dim: int, out_dim: int, hidden_dims: Sequence[int] | None, **options: Any) -> nn.Module:
    return MLP(in_dim, out_dim, (64, 64) if hidden_dims is None else hidden_dims, **options)
