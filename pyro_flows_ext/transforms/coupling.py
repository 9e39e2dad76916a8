"""Coupling layers: additive (NICE), affine (RealNVP) and rational-quadratic (Neural Spline Flows)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from typing_extensions import Unpack

from ..nn import MLP, ResidualConvNet
from ..nn.convnet import join_channels
from ..nn.mlp import join_context
from ..ops import rq_spline
from ._constrain import IMAGE, bounded_affine, check_event, check_positive, read_event_shape
from ._split import Split, make_split
from .base import FlowTransform
from .conditional import ContextualFlow
from .masks import Mask


class CouplingOptions(TypedDict, total=False):
    """Keywords that all coupling layers share: see `Coupling`."""

    mask: Mask
    flip: bool
    net: nn.Module | None
    activation: Callable[[], nn.Module]


class SplineCouplingOptions(CouplingOptions, total=False):
    """Keywords of spline coupling layers: see `SplineCoupling`."""

    num_bins: int
    bound: float


class Coupling(FlowTransform):
    """y_i = x_i where the mask is true, y_i = g(x_i; θ_i) elsewhere, with θ = net(x where the mask is true).

    log|det| = Σ_i log g'(x_i; θ_i), exact: the Jacobian is triangular. A subclass gives g, elementwise and monotone,
    by `num_params`, the length of θ_i, and `_elementwise(value, θ, inverse)`.

    `input_dim`: D for vectors, `(C, H, W)` for images.
    `mask`: True for the elements that pass through and feed the network, False for those that are transformed: any
    booleans of the shape of the event, "half" (passes the first D // 2, the default) or "alternating" (passes the
    elements 0, 2, 4, ...). For images these two go by channel, the first is also called "channel", and "checkerboard"
    passes the pixels with even h + w. `flip` swaps the two roles. One layer leaves what it passes untouched:
    alternate `flip`, or permute, from layer to layer.
    `net`: any module `(*, passed + context_dim) -> (*, num_params · transformed)`, where the output holds the first
    number of every θ_i, then the second, and so on; by default an `MLP` of `hidden_dims` (two layers of 64), whose last
    layer starts at zero and with it the transform at the identity. For images a module `(*, passed + context_dim, H, W)
    -> (*, num_params · transformed, H, W)`, where a mask that goes by channel counts channels, and with any other mask
    both counts are C: the network sees zeros in place of what is transformed, and what it emits for the rest is
    not used. By default a `ResidualConvNet` with one block for each of `hidden_dims`, which are its channels, all equal
    ((32, 32)). `context_dim` > 0 makes a layer that needs `with_context`: use the conditional classes.

    Shapes: x `(*, D)` or `(*, C, H, W)` -> y the same, ladj `(*)`. Cost: one pass of the network, the same in both
    directions. Raises `ValueError` when there is one element, when the mask passes or transforms nothing, when an input
    has another shape, when `net` gives the wrong number of parameters, when a context is needed and none was given, and
    on loading a `state_dict` of another mask.
    """

    num_params: int

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_dims: Sequence[int] | None = None,
        *,
        mask: Mask = "half",
        flip: bool = False,
        net: nn.Module | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__()
        self.event_shape = shape = read_event_shape(input_dim)
        self.input_dim = shape[0] if len(shape) == 1 else tuple(shape)
        self.context_dim = context_dim
        self._kind = (mask if isinstance(mask, str) else "custom", flip)
        self.split = make_split(mask, self.event_shape, flip)
        if net is not None and hidden_dims is not None:
            raise ValueError(
                "hidden_dims: these belong to the default network; give them or net, not both"
            )
        if net is None:
            in_dim, out_dim = self.split.seen[0], self.num_params * self.split.transformed[0]
            make_net = _mlp if len(self.event_shape) == 1 else _convnet
            net = make_net(
                in_dim,
                out_dim,
                hidden_dims,
                activation=activation,
                context_dim=context_dim,
                zero_last=True,
            )
        self.net = net

    def _elementwise(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """g or g⁻¹ at N elements `value` `(*, N)` under θ `(*, num_params, N)`, and its log-derivatives `(*, N)`.

        The elements of an image come in a row too.
        """
        raise TypeError(f"{type(self).__name__} must define _elementwise(value, theta, inverse)")

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple("x", x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple("y", y, inverse=True)

    def _couple(self, name: str, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        check_event(name, x, self.event_shape)
        if (context := self._read_context()) is not None:
            batch = x.shape[: -len(self.event_shape)]
            batch = torch.broadcast_shapes(batch, context.shape[:-1])
            x = x.expand(*batch, *self.event_shape)
        split = self.split
        seen, value = split.split(x)
        value, log_slope = self._elementwise(value, self._theta(seen, split), inverse)
        return split.join(seen, value), split.total(log_slope)

    def _theta(self, seen: Tensor, split: Split) -> Tensor:
        """θ `(*, num_params, N)` of the N transformed elements."""
        axis = -len(self.event_shape)
        if self.context_dim and self.context is not None:
            join = join_context if axis == -1 else join_channels
            seen = join(seen, self.context)
        theta = self.net(seen)
        n, *pixels = split.transformed
        expected = (self.num_params * n, *pixels)
        if theta.shape[axis:] != expected:
            raise ValueError(
                f"net: expected an output of shape (*, {', '.join(map(str, expected))}), that is {self.num_params} "
                f"parameters for each of {n} transformed {'elements' if axis == -1 else 'channels'}, got {tuple(theta.shape)}"
            )
        return theta.flatten(axis).unflatten(-1, (self.num_params, -1))

    @property
    def mask(self) -> Tensor:
        """True for the elements that pass: booleans of the shape of the event."""
        return self.split.mask

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return constraints.real_vector if len(self.event_shape) == 1 else IMAGE

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.domain

    def extra_repr(self) -> str:
        name, flip = self._kind
        return f"{self.input_dim}, mask={name!r}" + (", flip=True" if flip else "")


def _mlp(in_dim: int, out_dim: int, hidden_dims: Sequence[int] | None, **options: Any) -> nn.Module:
    return MLP(in_dim, out_dim, (64, 64) if hidden_dims is None else hidden_dims, **options)


def _convnet(
    in_channels: int, out_channels: int, hidden_dims: Sequence[int] | None, **options: Any
) -> nn.Module:
    widths = (32, 32) if hidden_dims is None else tuple(hidden_dims)
    if len(set(widths)) != 1:
        raise ValueError(
            f"hidden_dims: expected equal numbers of channels for images, one a residual block, got {widths}"
        )
    return ResidualConvNet(in_channels, out_channels, widths[0], len(widths), **options)


class AdditiveCoupling(Coupling):
    """y = x + t, with t from the elements that pass; log|det| = 0: a `Coupling` that keeps volume.

    Source: Dinh, Krueger & Bengio 2014, NICE: Non-linear Independent Components Estimation.
    """

    num_params = 1

    def _elementwise(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        t = theta.squeeze(-2)
        return value - t if inverse else value + t, torch.zeros_like(value)


class AffineCoupling(Coupling):
    """y = exp(s) ⊙ x + t, with t and s from the elements that pass; log|det| = Σ s: a `Coupling`.

    |s| < log 1000 for any parameter value.

    Source: Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP.
    """

    num_params = 2

    def _elementwise(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        t, raw = theta.unbind(-2)
        return bounded_affine(value, t, raw, inverse=inverse)


class SplineCoupling(Coupling):
    """y = g(x), g by element a monotone rational-quadratic spline whose knots come from the elements that pass.

    log|det| = Σ log g', exact. Each g has `num_bins` bins on [-bound, bound] and is the identity outside: see
    `ops.rq_spline`. The default of ±5 holds a standard normal variable and room for the tails of one that is not: a
    stack that learns standardised data fits skew and heavy-tailed ones better with it than with ±3, since what lies
    beyond cannot move. The layer of RQ-NSF(C); a `Coupling`.
    Raises `ValueError` unless `num_bins` and `bound` are positive.

    Source: Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows.
    """

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_dims: Sequence[int] | None = None,
        *,
        num_bins: int = 8,
        bound: float = 5.0,
        context_dim: int = 0,
        **options: Unpack[CouplingOptions],
    ):
        self.num_bins = check_positive("num_bins", num_bins)
        self.num_params = 3 * self.num_bins - 1  # the base builds a network for them
        super().__init__(input_dim, hidden_dims, context_dim=context_dim, **options)
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        self.bound = float(bound)

    def _elementwise(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return rq_spline(value, theta.mT, bound=self.bound, inverse=inverse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_bins={self.num_bins}, bound={self.bound:g}"


# --- conditional forms ---


class ConditionalAdditiveCoupling(ContextualFlow):
    """`AdditiveCoupling` whose network also sees a context `(*, C)`; `.condition(context)` gives the transform."""

    base = AdditiveCoupling


class ConditionalAffineCoupling(ContextualFlow):
    """`AffineCoupling` whose network also sees a context `(*, C)`; `.condition(context)` gives the transform."""

    base = AffineCoupling


class ConditionalSplineCoupling(ContextualFlow):
    """`SplineCoupling` whose network also sees a context `(*, C)`; `.condition(context)` gives the transform."""

    base = SplineCoupling


def additive_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> AdditiveCoupling:
    """An additive coupling layer: see `AdditiveCoupling`, and `Coupling` for the options."""
    return AdditiveCoupling(input_dim, hidden_dims, **options)


def affine_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> AffineCoupling:
    """An affine coupling layer: see `AffineCoupling`, and `Coupling` for the options."""
    return AffineCoupling(input_dim, hidden_dims, **options)


def spline_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[SplineCouplingOptions],
) -> SplineCoupling:
    """A rational-quadratic coupling layer: see `SplineCoupling`, and `Coupling` for the options."""
    return SplineCoupling(input_dim, hidden_dims, **options)


def conditional_additive_coupling(
    input_dim: int | Sequence[int],
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> ConditionalAdditiveCoupling:
    """An additive coupling layer amortized over a context: see `ConditionalAdditiveCoupling`."""
    return ConditionalAdditiveCoupling(input_dim, context_dim, hidden_dims, **options)


def conditional_affine_coupling(
    input_dim: int | Sequence[int],
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> ConditionalAffineCoupling:
    """An affine coupling layer amortized over a context: see `ConditionalAffineCoupling`."""
    return ConditionalAffineCoupling(input_dim, context_dim, hidden_dims, **options)


def conditional_spline_coupling(
    input_dim: int | Sequence[int],
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[SplineCouplingOptions],
) -> ConditionalSplineCoupling:
    """A rational-quadratic coupling layer amortized over a context: see `ConditionalSplineCoupling`."""
    return ConditionalSplineCoupling(input_dim, context_dim, hidden_dims, **options)
