"""Continuously indexed transforms: a family of maps around one, told apart by an index u (Cornish et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from typing_extensions import Unpack

from ..nn import MLP
from ._constrain import bounded_affine, check_event, check_positive, find_event_shape
from .base import FlowTransform
from .compose import ComposeFlow, at_context, reads_context
from .conditional import ConditionalModule

Inner = FlowTransform | ConditionalTransformModule


class IndexedOptions(TypedDict, total=False):
    """Keywords of indexed transforms: see `IndexedTransform`."""

    activation: Callable[[], nn.Module]
    context_dim: int
    input_dim: int | None


class IndexedTransform(ConditionalModule):
    """F(z; u) = f(exp(s(u)) ⊙ z + t(u)) around any transform f; `.condition(u)` gives the transform z -> F(z; u).

    log|det| = log|det Df| + Σ s(u), as exact as that of f. `condition(u)` with an index u `(*, index_dim)` gives a
    `ComposeFlow` of batch shape `(*)`. s and t are the outputs of one network of `hidden_dims` that starts at zero: F
    starts as f for every u. |s| < log 1000 for any parameter value.

    f acts on vectors `(*, D)`, or on images `(*, C, H, W)`, for which s and t hold one number a channel. D or C is
    read off f (`input_dim`); say `input_dim` where f has none.
    `context_dim` > 0: `condition(u, context)`, with a context `(*, context_dim)` that the network sees beside u, and
    that f sees where it takes one (a conditional transform, or one built with `context_dim`).
    Cost: that of f and one pass of the network, which does not see z.
    Raises `TypeError` when f is no transform, `ValueError` when f is not defined on all of ℝⁿ, takes a context where
    `context_dim` is 0, or does not tell its size; when u or the context have another last dimension, or one is missing.

    Source: Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
    Normalising Flows.
    """

    def __init__(
        self,
        transform: Inner,
        index_dim: int = 1,
        hidden_dims: Sequence[int] = (10, 10),
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        context_dim: int = 0,
        input_dim: int | None = None,
    ):
        super().__init__()
        if not isinstance(transform, FlowTransform | ConditionalTransformModule):
            raise TypeError(
                f"transform: expected a FlowTransform or a ConditionalTransformModule, got a {type(transform).__name__}"
            )
        if reads_context(transform) and not context_dim:
            raise ValueError(
                "transform: it takes a context; give context_dim, and the context to condition(u, context)"
            )
        self.index_dim = check_positive("index_dim", index_dim)
        self.context_dim = context_dim
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
        """The transform at u = `index`: `(*, index_dim)` -> a transform of batch shape `(*)`.

        A context `(*, context_dim)` broadcasts against it.
        """
        check_event("index", index, self.index_dim)
        transform: Any = self.transform
        if self.context_dim:
            if context is None:
                raise ValueError(
                    f"condition: built with context_dim={self.context_dim}; call condition(index, context)"
                )
            check_event("context", context, self.context_dim)
            transform = at_context(transform, context)
        elif context is not None:
            raise ValueError("condition: built without context_dim, got a context")
        shift, log_scale = self.net(index, context).chunk(2, -1)
        return ComposeFlow([_Affine(shift, log_scale, transform.domain), transform])

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


def indexed(
    transform: Inner,
    index_dim: int = 1,
    hidden_dims: Sequence[int] = (10, 10),
    **options: Unpack[IndexedOptions],
) -> IndexedTransform:
    """A transform for every value of an index: see `IndexedTransform`."""
    return IndexedTransform(transform, index_dim, hidden_dims, **options)
