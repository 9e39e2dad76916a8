"""Continuously indexed transforms: a family of maps around one transform, with an index u (Cornish et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from ..nn import MLP
from ..ops import (
    check_context_dim,
    check_event,
    check_positive,
    check_same_dtype,
    find_event_shape,
)
from .base import FlowTransform, forget_param_store
from .bounds import bounded_affine
from .compose import ComposeFlow


class IndexedTransform(ConditionalTransformModule):
    """F(z; u) = f(exp(s(u)) ⊙ z + t(u)) around any transform f: a family of maps, conditioned on an index u.

    log|det| = log|det Df| + Σ s(u), as exact as that of f. s and t come from one network that starts at zero: F starts
    as f for every u. |s| < log 1000 for any parameter value. Cost: that of f and one pass of the network, which
    does not read z.

    Args:
        transform: f, on vectors `(*, D)`, or on images `(*, C, H, W)`, for which s and t hold one number a channel.
        index_dim: length of u.
        hidden_dims: widths of the network of s and t.
        activation: of that network.
        context_dim: number of further context variables, which the network reads beside u, and which f is
            conditioned on if it takes a context.
        input_dim: D or C, if f has no attribute of that name.

    Raises:
        TypeError: if `transform` is not a `FlowTransform`.
        ValueError: if f is not defined on all of ℝⁿ, expects a context of another size, or has no `input_dim`.

    Example:
        >>> family = IndexedTransform(Planar(3), index_dim=2)
        >>> family.condition(torch.zeros(5, 2)).batch_shape
        torch.Size([5])

    References:
        Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
        Normalising Flows.
    """

    transform: FlowTransform

    def __init__(
        self,
        transform: FlowTransform,
        index_dim: int = 1,
        hidden_dims: Sequence[int] = (10, 10),
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: int = 0,
        input_dim: int | None = None,
    ):
        super().__init__()
        if not isinstance(transform, FlowTransform):
            raise TypeError(
                f"transform: expected a FlowTransform, got a {type(transform).__name__}"
            )
        self.index_dim = check_positive("index_dim", index_dim)
        self.context_dim = check_context_dim(context_dim)
        if transform.context_dim not in (0, self.context_dim):
            raise ValueError(
                f"transform: expected one with the context_dim of IndexedTransform, {self.context_dim}, or 0, got "
                f"{transform.context_dim}; give the same context_dim to both, and the context to condition(u, context)"
            )
        self.transform = transform
        size = _read_input_dim(transform) if input_dim is None else input_dim
        self.net = MLP(
            index_dim,
            2 * check_positive("input_dim", size),
            hidden_dims,
            activation=activation,
            context_dim=context_dim,
            zero_last=True,
        )

    def condition(self, index: Tensor, context: Tensor | None = None) -> ComposeFlow:  # type: ignore[override]
        """Returns the transform z -> F(z; u).

        Args:
            index: u, `(*, index_dim)`.
            context: `(*, context_dim)`, broadcast against u; None where `context_dim` is 0.

        Returns:
            A `ComposeFlow` of an affine map and f, of batch shape `(*)`.

        Raises:
            ValueError: if u or the context has another size, or a context is missing or not expected.
        """
        check_event("index", index, self.index_dim)
        check_same_dtype("index", index, next(self.net.parameters(), index))
        transform = self.transform
        if self.context_dim:
            if context is None:
                raise ValueError(
                    f"context: expected a tensor of shape (*, {self.context_dim}), got None; call "
                    "condition(index, context)"
                )
            check_event("context", context, self.context_dim)
            transform = transform.condition(context)
        elif context is not None:
            raise ValueError("context: expected None, since context_dim is 0, got a tensor")
        shift, log_scale = self.net(index, context).chunk(2, -1)
        return ComposeFlow([_Affine(shift, log_scale, transform.domain), transform])

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return dict(self.__dict__)

    def __repr__(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{type(self).__name__}({self.transform!r}, index_dim={self.index_dim}{context})"


class _Affine(FlowTransform):
    """y = exp(s) ⊙ x + t for given s and t `(*, D)`, of vectors by element, of images by channel."""

    def __init__(self, shift: Tensor, log_scale: Tensor, domain: Any):
        if getattr(domain, "base_constraint", domain) is not constraints.real:
            raise ValueError(
                f"transform: expected one of unconstrained values, got one of {domain}"
            )
        super().__init__()
        self.domain = self.codomain = domain
        self.batch_shape = shift.shape[:-1]
        self._bound = (shift, log_scale)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine("x", x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine("y", y, inverse=True)

    def _affine(self, name: str, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, raw = self._bound
        outer = (1,) * (self.domain.event_dim - 1)  # rows and columns of an image
        cut = x.dim() - len(outer)
        if cut < 1 or x.shape[cut - 1] != shift.shape[-1]:
            event = ", ".join([str(shift.shape[-1]), *("H", "W")[: len(outer)]])
            raise ValueError(
                f"{name}: expected a tensor of shape (*, {event}), got {tuple(x.shape)}"
            )
        self._broadcast_shape(x.shape, self.domain.event_dim)
        # Bounded, because u comes from a density with tails: where few draws have taught the network anything, an
        # unbounded scale overflows, and one such draw ruins the whole estimate.
        y, s = bounded_affine(
            x, shift.reshape(*shift.shape, *outer), raw.reshape(*raw.shape, *outer), inverse=inverse
        )
        s = s.flatten(-1 - len(outer)).sum(-1) * math.prod(x.shape[cut:])
        return y, s.expand(y.shape[: y.dim() - 1 - len(outer)])

    def extra_repr(self) -> str:
        return f"{self._bound[0].shape[-1]}"


def _read_input_dim(transform: nn.Module) -> int:
    shape = find_event_shape(transform)
    if shape is None:
        raise ValueError(
            f"input_dim: {type(transform).__name__} has none to read; give input_dim, the length of its vectors or the "
            "number of channels of its images"
        )
    return shape[0]  # D, or the channels of (C, H, W)
