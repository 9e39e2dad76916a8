"""Affine transforms that place and scale a flow: one learnable by element, one fixed and full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import check_positive, check_same_dtype, matvec
from ..ops.linalg import solve_triangular
from .base import FlowTransform
from .scores import by_diagonal, residual


class ElementwiseAffine(FlowTransform):
    """y = loc + exp(log_scale) ⊙ x, with learnable `loc` and `log_scale` `(D)`.

    log|det| = Σ log_scale, exact. Starts at the identity. Cost: O(D) in both directions.

    Args:
        input_dim: D, for events `(*, D)`.
        context_dim: number of context variables that `loc` and `log_scale` depend on.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: if `input_dim` is not positive, or in a pass if the last dimension is not D.

    Example:
        >>> y, ladj = ElementwiseAffine(3).forward_and_ladj(torch.zeros(5, 3))
        >>> y.shape, ladj.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self, input_dim: int, *, context_dim: int = 0, hidden_dims: Sequence[int] | None = None
    ):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        self.add_hyper_network(context_dim, hidden_dims)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        y = self.loc + self.log_scale.exp() * x
        return y, self.log_scale.sum(-1).expand(y.shape[:-1])

    carries_scores = True

    def forward_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self.forward_and_ladj(x)
        return y, ladj, by_diagonal(x, y, residual(x, ladj, score))

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        x = (y - self.loc) * (-self.log_scale).exp()
        return x, -self.log_scale.sum(-1).expand(x.shape[:-1])

    def extra_repr(self) -> str:
        return f"{self.input_dim}"


class Whitening(FlowTransform):
    """y = loc + L x for a fixed vector `loc` `(D)` and a fixed lower-triangular matrix L = `scale_tril` `(D, D)`.

    log|det| = Σ log L_ii, exact. `loc` and L are buffers, not parameters: the flow in front of this layer learns in
    whitened coordinates. Cost: O(D²) in both directions.

    Args:
        loc: `(D)`.
        scale_tril: `(D, D)`, with a positive diagonal; elements above the diagonal are ignored.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or the diagonal is not positive.

    Example:
        >>> Whitening(torch.ones(2), 3 * torch.eye(2))(torch.zeros(2))
        tensor([1., 1.])
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
        self._check_input("x", x)
        check_same_dtype("x", x, self.loc)  # a buffer
        y = self.loc + matvec(self.scale_tril, x)
        return y, self._ladj().expand(y.shape[:-1])

    carries_scores = True

    def forward_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, ladj = self.forward_and_ladj(x)
        return y, ladj, solve_triangular(self.scale_tril.mT, score, upper=True)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        check_same_dtype("y", y, self.loc)
        x = solve_triangular(self.scale_tril, y - self.loc, upper=False)
        return x, -self._ladj().expand(x.shape[:-1])

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
