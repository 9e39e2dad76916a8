"""Continuously indexed transforms: a family of maps around one transform, with an index u (Cornish et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Size, Tensor, nn

from ..nn import MLP
from ..nn.convnet import convnet
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
        transform: f, on vectors `(*, D)` or on images `(*, C, H, W)`.
        index_dim: length of u, for which s and t of images hold one number a channel; or `(c, H, W)` for u an image of
            the size of those that f takes, for which they hold one for each element.
        hidden_dims: widths of the network of s and t, an `nn.MLP`; for u an image an `nn.ResidualConvNet` with one
            block for each entry, all equal.
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
        index_dim: int | Sequence[int] = 1,
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
        self.index_shape = read_index_shape(index_dim)
        self.context_dim = check_context_dim(context_dim)
        if transform.context_dim not in (0, self.context_dim):
            raise ValueError(
                f"transform: expected one with the context_dim of IndexedTransform, {self.context_dim}, or 0, got "
                f"{transform.context_dim}; give the same context_dim to both, and the context to condition(u, context)"
            )
        if len(self.index_shape) > transform.domain.event_dim:
            raise ValueError(
                "index_dim: expected the length of a vector for a transform of vectors, got "
                f"{tuple(self.index_shape)}"
            )
        self.transform = transform
        size = _read_input_dim(transform) if input_dim is None else input_dim
        out_dim = 2 * check_positive("input_dim", size)
        self.net = make_network(
            self.index_shape,
            out_dim,
            hidden_dims,
            activation=activation,
            context_dim=context_dim,
            zero_last=True,
        )

    @property
    def index_dim(self) -> int | tuple[int, ...]:
        """Length of u, or its shape where it is an image."""
        return self.index_shape[0] if len(self.index_shape) == 1 else tuple(self.index_shape)

    def condition(self, index: Tensor, context: Tensor | None = None) -> ComposeFlow:  # type: ignore[override]
        """Returns the transform z -> F(z; u).

        Args:
            index: u, `(*, index_dim)`, or an image `(*, c, H, W)`.
            context: `(*, context_dim)`, broadcast against u; None where `context_dim` is 0.

        Returns:
            A `ComposeFlow` of an affine map and f, of batch shape `(*)`.

        Raises:
            ValueError: if u or the context has another size, or a context is missing or not expected.
        """
        check_event("index", index, self.index_shape)
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
        shift, log_scale = self.net(index, context).chunk(2, -len(self.index_shape))
        outer = transform.domain.event_dim - len(self.index_shape)
        if outer:  # one number for all rows and columns
            shift, log_scale = (t.reshape(*t.shape, *(1,) * outer) for t in (shift, log_scale))
        return ComposeFlow([_Affine(shift, log_scale, transform.domain), transform])

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return dict(self.__dict__)

    def __repr__(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{type(self).__name__}({self.transform!r}, index_dim={self.index_dim}{context})"


class _Affine(FlowTransform):
    """y = exp(s) ⊙ x + t for given s and t `(*, D)`, or `(*, C, H, W)` and `(*, C, 1, 1)` for images."""

    def __init__(self, shift: Tensor, log_scale: Tensor, domain: Any):
        if getattr(domain, "base_constraint", domain) is not constraints.real:
            raise ValueError(
                f"transform: expected one of unconstrained values, got one of {domain}"
            )
        super().__init__()
        self.domain = self.codomain = domain
        self.batch_shape = shift.shape[: shift.dim() - domain.event_dim]
        self._bound = (shift, log_scale)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine("x", x, inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine("y", y, inverse=True)

    def _affine(self, name: str, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, raw = self._bound
        dims = self.domain.event_dim
        event = shift.shape[shift.dim() - dims :]
        if x.dim() < dims or any(
            n not in (1, m) if i else n != m
            for i, (n, m) in enumerate(zip(event, x.shape[x.dim() - dims :], strict=True))
        ):
            sizes = ", ".join(f if n == 1 and f else str(n) for n, f in zip(event, ("", "H", "W"), strict=False))  # fmt: skip
            raise ValueError(
                f"{name}: expected a tensor of shape (*, {sizes}), got {tuple(x.shape)}"
            )
        self._broadcast_shape(x.shape, dims)
        # Bounded, because u comes from a density with tails: where few draws have taught the network anything, an
        # unbounded scale overflows, and one such draw ruins the whole estimate.
        y, s = bounded_affine(x, shift, raw, inverse=inverse)
        return y, s.expand_as(y).flatten(-dims).sum(-1)

    def extra_repr(self) -> str:
        shape = self._bound[0].shape[len(self.batch_shape) :]
        return str(shape[0] if len(shape) == 1 else tuple(shape))


def read_index_shape(index_dim: int | Sequence[int]) -> Size:
    """Returns the shape of u: `(d)` or `(c, H, W)`; `ValueError` for anything else."""
    sizes = (index_dim,) if isinstance(index_dim, int) else tuple(index_dim)
    if len(sizes) not in (1, 3):
        raise ValueError(f"index_dim: expected a positive integer or (c, H, W), got {index_dim!r}")
    return Size(check_positive("index_dim", size) for size in sizes)


def make_network(
    shape: Sequence[int], out_dim: int, hidden_dims: Sequence[int], **options: Any
) -> nn.Module:
    """Returns a network of vectors `(*, D)` -> `(*, out_dim)`, or of images `(*, C, H, W)` -> `(*, out_dim, H, W)`."""
    if len(shape) == 1:
        return MLP(shape[0], out_dim, hidden_dims, **options)
    return convnet(shape[0], out_dim, hidden_dims, **options)


def _read_input_dim(transform: nn.Module) -> int:
    shape = find_event_shape(transform)
    if shape is None:
        raise ValueError(
            f"input_dim: {type(transform).__name__} has none to read; give input_dim, the length of its vectors or the "
            "number of channels of its images"
        )
    return shape[0]  # D, or the channels of (C, H, W)
