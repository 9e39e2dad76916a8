"""Coupling layers: additive (NICE), affine (RealNVP) and rational-quadratic (Neural Spline Flows)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..nn import MLP
from ..nn.mlp import join_context
from ..ops import rq_spline
from ._constrain import bounded_affine, check_event, check_positive
from .base import FlowTransform
from .conditional import ContextualFlow
from .masks import Mask, passed_elements


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

    `mask`: True for the elements that pass through and feed the network, False for those that are transformed: any
    booleans `(D,)`, "half" (passes the first D // 2) or "alternating" (passes the elements 0, 2, 4, ...); `flip` swaps
    the two roles. One layer leaves what it passes untouched: alternate `flip`, or permute, from layer to layer.
    `net`: any module `(*, passed + context_dim) -> (*, num_params · transformed)`, where the output holds the first
    number of every θ_i, then the second, and so on; by default an `MLP` of `hidden_dims` (two layers of 64), whose last
    layer starts at zero and with it the transform at the identity. `context_dim` > 0 makes a layer that needs
    `with_context`: use the conditional classes.

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Cost: one pass of the network, the same in both directions.
    Raises `ValueError` when D = 1, when the mask passes or transforms nothing, when the last dimension is not D, when
    `net` gives the wrong number of parameters, when a context is needed and none was given, and on loading a
    `state_dict` of another mask.
    """

    mask: Tensor
    _order: Tensor
    _inverse_order: Tensor
    num_params: int

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        mask: Mask = "half",
        flip: bool = False,
        net: nn.Module | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context_dim: int = 0,
    ):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.context_dim = context_dim
        self._kind = (mask if isinstance(mask, str) else "custom", flip)
        passes = passed_elements(mask, D, flip)
        # Blocks in the order in which they begin, so that two halves need no index, only views. By Python, not by
        # `nonzero`: a layer can be built on the meta device.
        order = sorted(range(D), key=lambda i: passes[i] != passes[0])
        self._passed_first, self._in_order = passes[0], order == list(range(D))
        passed = sum(passes)
        self._sizes = (passed, D - passed)
        self.register_buffer("mask", torch.tensor(passes))
        self.register_buffer("_order", torch.tensor(order))
        self.register_buffer(
            "_inverse_order", torch.tensor(sorted(range(D), key=order.__getitem__))
        )
        if net is not None and hidden_dims is not None:
            raise ValueError(
                "hidden_dims: these belong to the default network; give them or net, not both"
            )
        if net is None:
            net = MLP(
                passed,
                self.num_params * (D - passed),
                (64, 64) if hidden_dims is None else hidden_dims,
                activation=activation,
                context_dim=context_dim,
                zero_last=True,
            )
        self.net = net

    def _elementwise(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """g or g⁻¹ at `value` `(*, N)` under θ `(*, num_params, N)`, and the sum of its log-derivatives `(*)`."""
        raise TypeError(f"{type(self).__name__} must define _elementwise(value, theta, inverse)")

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple("x", x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._couple("y", y, inverse=True)

    def _couple(self, name: str, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        check_event(name, x, self.input_dim)
        if self.context_dim:
            if self.context is None:
                raise ValueError(
                    f"{type(self).__name__}: built with context_dim={self.context_dim}; "
                    "call condition(context) first"
                )
            batch = torch.broadcast_shapes(x.shape[:-1], self.context.shape[:-1])
            x = x.expand(*batch, -1)
        passed, value = self._split(x)
        value, ladj = self._elementwise(value, self._theta(passed), inverse)
        return self._join(passed, value), ladj

    def _theta(self, passed: Tensor) -> Tensor:
        """θ `(*, num_params, N)` of the N transformed elements."""
        if self.context_dim and self.context is not None:
            passed = join_context(passed, self.context)
        theta = self.net(passed)
        sizes = (self.num_params, self._sizes[1])
        if theta.shape[-1] != sizes[0] * sizes[1]:
            raise ValueError(
                f"net: expected an output of shape (*, {sizes[0] * sizes[1]}), that is {sizes[0]} parameters for each of "
                f"{sizes[1]} transformed elements, got {tuple(theta.shape)}"
            )
        return theta.unflatten(-1, sizes)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The elements that pass and those that are transformed."""
        if not self._in_order:
            x = x.index_select(-1, self._order)
        if self._passed_first:
            passed, value = x.split(self._sizes, -1)
        else:
            value, passed = x.split(self._sizes[::-1], -1)
        return passed, value

    def _join(self, passed: Tensor, value: Tensor) -> Tensor:
        """The inverse of `_split`."""
        y = torch.cat([passed, value] if self._passed_first else [value, passed], -1)
        return y if self._in_order else y.index_select(-1, self._inverse_order)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # The shapes of two masks can agree where their meaning does not.
        saved = state_dict.get(f"{prefix}mask", self.mask)
        if not (saved.is_meta or self.mask.is_meta) and saved.tolist() != self.mask.tolist():
            raise ValueError(
                f"{prefix}mask: expected {self.mask.tolist()}, the saved one is {saved.tolist()}; "
                "build the transform with the mask that it was saved with"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        name, flip = self._kind
        return f"{self.input_dim}, mask={name!r}" + (", flip=True" if flip else "")


class AdditiveCoupling(Coupling):
    """y = x + t, with t from the elements that pass; log|det| = 0: a `Coupling` that keeps volume.

    Source: Dinh, Krueger & Bengio 2014, NICE: Non-linear Independent Components Estimation.
    """

    num_params = 1

    def _elementwise(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        t = theta.squeeze(-2)
        return value - t if inverse else value + t, value.new_zeros(value.shape[:-1])


class AffineCoupling(Coupling):
    """y = exp(s) ⊙ x + t, with t and s from the elements that pass; log|det| = Σ s: a `Coupling`.

    |s| < log 1000 for any parameter value.

    Source: Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP.
    """

    num_params = 2

    def _elementwise(self, value: Tensor, theta: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        t, raw = theta.unbind(-2)
        y, log_scale = bounded_affine(value, t, raw, inverse=inverse)
        return y, log_scale.sum(-1)


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
        input_dim: int,
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
        y, ladj = rq_spline(value, theta.mT, bound=self.bound, inverse=inverse)
        return y, ladj.sum(-1)

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
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> AdditiveCoupling:
    """An additive coupling layer: see `AdditiveCoupling`, and `Coupling` for the options."""
    return AdditiveCoupling(input_dim, hidden_dims, **options)


def affine_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> AffineCoupling:
    """An affine coupling layer: see `AffineCoupling`, and `Coupling` for the options."""
    return AffineCoupling(input_dim, hidden_dims, **options)


def spline_coupling(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[SplineCouplingOptions],
) -> SplineCoupling:
    """A rational-quadratic coupling layer: see `SplineCoupling`, and `Coupling` for the options."""
    return SplineCoupling(input_dim, hidden_dims, **options)


def conditional_additive_coupling(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> ConditionalAdditiveCoupling:
    """An additive coupling layer amortized over a context: see `ConditionalAdditiveCoupling`."""
    return ConditionalAdditiveCoupling(input_dim, context_dim, hidden_dims, **options)


def conditional_affine_coupling(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[CouplingOptions],
) -> ConditionalAffineCoupling:
    """An affine coupling layer amortized over a context: see `ConditionalAffineCoupling`."""
    return ConditionalAffineCoupling(input_dim, context_dim, hidden_dims, **options)


def conditional_spline_coupling(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[SplineCouplingOptions],
) -> ConditionalSplineCoupling:
    """A rational-quadratic coupling layer amortized over a context: see `ConditionalSplineCoupling`."""
    return ConditionalSplineCoupling(input_dim, context_dim, hidden_dims, **options)
