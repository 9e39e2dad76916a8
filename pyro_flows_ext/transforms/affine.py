"""Affine transforms that place and scale a flow: one learnable by element, one fixed and full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import matvec
from ..ops.linalg import solve_triangular
from ._constrain import check_event, check_positive
from .base import FlowTransform
from .conditional import ConditionalFlow


class ElementwiseAffine(FlowTransform):
    """y = loc + exp(log_scale) ⊙ x, with learnable `loc` and `log_scale` `(D)`; log|det| = Σ log_scale, exact.

    Starts at the identity. Shapes `(*, D)`; O(D) in both directions.
    """

    def __init__(self, input_dim: int):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        y = self.loc + self.log_scale.exp() * x
        return y, self.log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
        x = (y - self.loc) * (-self.log_scale).exp()
        return x, -self.log_scale.sum(-1).expand(x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.input_dim}"


class ConditionalElementwiseAffine(ConditionalFlow):
    """`ElementwiseAffine` whose loc and scale depend on a context `(*, C)`; `.condition(context)` gives the transform.

    The hyper-network's last layer emits 2D numbers a datum.
    """

    def __init__(self, input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None):
        super().__init__(ElementwiseAffine(input_dim), context_dim, hidden_dims)


def elementwise_affine(input_dim: int) -> ElementwiseAffine:
    """A learnable location and scale by coordinate: see `ElementwiseAffine`."""
    return ElementwiseAffine(input_dim)


def conditional_elementwise_affine(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None
) -> ConditionalElementwiseAffine:
    """A location and scale by coordinate, amortized over a context: see `ConditionalElementwiseAffine`."""
    return ConditionalElementwiseAffine(input_dim, context_dim, hidden_dims)


class Whitening(FlowTransform):
    """y = loc + L x for a fixed vector `loc` `(D)` and lower-triangular `scale_tril` L `(D, D)`.

    log|det| = Σ log L_ii, exact; buffers, not parameters: the flow in front of it learns in whitened coordinates.
    Shapes `(*, D)`; O(D²) in both directions. Raises `ValueError` for shapes that do not fit, values that are not
    finite, or a diagonal that is not positive.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor):
        super().__init__()
        check_whitening(loc, scale_tril)
        self.input_dim = loc.shape[0]
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale_tril", scale_tril.detach().tril())

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        y = self.loc + matvec(self.scale_tril, x)
        return y, self._ladj().expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
        x = solve_triangular(self.scale_tril, y - self.loc, upper=False)
        return x, -self._ladj().expand(y.shape[:-1])

    def _ladj(self) -> Tensor:
        return self.scale_tril.diagonal().log().sum()

    def extra_repr(self) -> str:
        return f"{self.input_dim}"


def check_whitening(loc: Tensor, scale_tril: Tensor) -> None:
    """Raises `ValueError` unless `loc` `(D)` and `scale_tril` `(D, D)` are finite, with a positive diagonal."""
    if loc.dim() != 1 or scale_tril.shape != (loc.shape[0], loc.shape[0]):
        raise ValueError(
            "whitening: expected loc of shape (D,) and scale_tril of shape (D, D), "
            f"got {tuple(loc.shape)} and {tuple(scale_tril.shape)}"
        )
    if not (loc.isfinite().all() and scale_tril.isfinite().all()):
        raise ValueError("whitening: loc and scale_tril must be finite")
    if not bool((scale_tril.diagonal() > 0).all()):
        raise ValueError("whitening: the diagonal of scale_tril must be positive")
