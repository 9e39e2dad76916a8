"""Linear layers whose log-det costs O(D): LU and QR factors, products of reflections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_positive, matvec
from ..ops.linalg import is_zero, reflect, solve_triangular
from .base import FlowTransform
from .bounds import slope_minus_one
from .permute import parity

# A batch of as many numbers (and of four times as many rows as columns) is worth multiplying out the factors for: on
# one core, 1.3 (LU) to 2 times (QR) faster than a product with each factor, and 1.1 times slower on smaller batches.
FORM_ABOVE = 2**15


class LULinear(FlowTransform):
    """y = P (L U x + b) with P a fixed permutation, L unit lower and U upper triangular with a positive diagonal.

    log|det| = Σ log U_ii, exact. U_ii lies above 1e-3 for any parameter value, so the layer is always invertible.
    Starts at the identity, or at P with `permute=True`, with which L and U reach matrices that they alone do not (the
    zero in [[0, 1], [1, 0]] has no LU factors). `sign` is P's parity.

    Parameters: `lu` `(D, D)`, L below its diagonal, U on and above; `bias` `(D)`. Buffer: `permutation` `(D)`. Cost:
    O(D²) a row in both directions; the inverse is two triangular solves for the whole batch. Nothing is factored,
    inverted or cached.

    Args:
        input_dim: D, for events `(*, D)`.
        bias: whether b is learned; 0 otherwise.
        permute: whether P is a random permutation, drawn once from torch's generator; the identity otherwise.
        context_dim: number of context variables that L, U and b depend on.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: if `input_dim` is not positive, or in a pass if the last dimension is not D.

    Example:
        >>> LULinear(3, permute=True)
        LULinear(3, bias=True, permute=True)

    References:
        Oliva et al. 2018, Transformation Autoregressive Networks; with P, Kingma & Dhariwal 2018, Glow.
    """

    bias: Tensor | None
    permutation: Tensor | None

    def __init__(
        self,
        input_dim: int,
        *,
        bias: bool = True,
        permute: bool = False,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.lu = nn.Parameter(torch.zeros(D, D))
        self.register_parameter("bias", nn.Parameter(torch.zeros(D)) if bias else None)
        self.register_buffer("permutation", torch.randperm(D) if permute else None)
        self.add_hyper_network(context_dim, hidden_dims)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        LU, ladj = _positive_diagonal(self.lu)
        L, U = LU.tril(-1), LU.triu()

        def product(rows: Tensor) -> Tensor:
            h = matvec(U, rows)
            return self._permuted(h + matvec(L, h))

        bias = None if self.bias is None else self._permuted(self.bias)
        y = _apply(product, x, bias, may_form=LU.dim() == 2)
        return y, ladj.expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        LU, ladj = _positive_diagonal(self.lu)
        h = y if self.permutation is None else y.index_select(-1, self.permutation.argsort())
        h = h if self.bias is None else h - self.bias
        # Each solve reads its own triangle of the packed factors, and the first takes the diagonal of L for ones.
        h = solve_triangular(LU, h, upper=False, unitriangular=True)
        x = solve_triangular(LU, h, upper=True)
        return x, -ladj.expand(x.shape[:-1])

    def _permuted(self, rows: Tensor) -> Tensor:
        return rows if self.permutation is None else rows.index_select(-1, self.permutation)

    @property
    def sign(self) -> int:
        return 1 if self.permutation is None else parity(self.permutation)

    def extra_repr(self) -> str:
        bias, permute = self.bias is not None, self.permutation is not None
        return f"{self.input_dim}, bias={bias}, permute={permute}"


class QRLinear(FlowTransform):
    """y = Q R x + b with Q a product of Householder reflections and R upper triangular with a positive diagonal.

    log|det| = Σ log R_ii, exact. R_ii lies above 1e-3 for any parameter value, so the layer is always invertible.
    Starts near the identity for an even number of reflections: they come in pairs of nearly equal ones, which undo
    each other, while the gradient in their difference stays (a pair at the angle φ rotates by 2φ). The last of an odd
    number starts as a random mirror. `sign` as in `HouseholderLinear`.

    Parameters: `v` `(K, D)`, one reflection a row; `r` `(D, D)`, read on and above its diagonal; `bias` `(D)`. Cost:
    O(K² D) a pass and O(KD + D²) a row in both directions; the inverse is Qᵀ and one triangular solve.

    Args:
        input_dim: D, for events `(*, D)`.
        num_reflections: K; by default 2 ⌊D / 2⌋ (at least 2), with which Q reaches every rotation, and QR every
            matrix of positive determinant.
        bias: whether b is learned; 0 otherwise.
        context_dim: number of context variables that Q, R and b depend on.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: if a size is not positive, or in a pass if the last dimension is not D.

    Example:
        >>> QRLinear(3)
        QRLinear(3, num_reflections=2, bias=True)

    References:
        Hoogeboom, van den Berg & Welling 2019, Emerging Convolutions for Generative Normalizing Flows.
    """

    bias: Tensor | None

    def __init__(
        self,
        input_dim: int,
        *,
        num_reflections: int | None = None,
        bias: bool = True,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.v = nn.Parameter(_near_identity(D, num_reflections))
        self.r = nn.Parameter(torch.zeros(D, D))
        self.register_parameter("bias", nn.Parameter(torch.zeros(D)) if bias else None)
        self.add_hyper_network(context_dim, hidden_dims)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        R, ladj = _positive_diagonal(self.r)
        R = R.triu()
        may_form = R.dim() == 2 and self.v.dim() == 2
        y = _apply(lambda rows: reflect(self.v, matvec(R, rows)), x, self.bias, may_form=may_form)
        return y, ladj.expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        R, ladj = _positive_diagonal(self.r)
        h = y if self.bias is None else y - self.bias
        x = solve_triangular(R, _orthogonal(self.v, h, transpose=True), upper=True)
        return x, -ladj.expand(x.shape[:-1])

    @property
    def sign(self) -> Tensor:  # type: ignore[override]
        """As in `HouseholderLinear`: the determinant of Q."""
        return _sign_of_reflections(self.v)

    def extra_repr(self) -> str:
        K, bias = self.v.shape[-2], self.bias is not None
        return f"{self.input_dim}, num_reflections={K}, bias={bias}"


class HouseholderLinear(FlowTransform):
    """y = H_1 ... H_K x with H_i = I - 2 v_i v_iᵀ / ‖v_i‖²: an orthogonal map, so log|det| = 0.

    Starts as `QRLinear` does. The transpose is the inverse. `sign` `(*)` is a tensor: (-1)^K unless some v_i is zero,
    which reflects nothing.

    Parameters: `v` `(K, D)`, one reflection a row. Cost: O(K² D) a pass and O(KD) a row in both directions: all K
    reflections are taken in one piece, not in turn.

    Args:
        input_dim: D, for events `(*, D)`.
        num_reflections: K; 2 ⌊D / 2⌋ (at least 2) by default.
        context_dim: number of context variables that the reflections depend on.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: if a size is not positive, or in a pass if the last dimension is not D.

    Example:
        >>> HouseholderLinear(3, num_reflections=4)
        HouseholderLinear(3, num_reflections=4)

    References:
        Tomczak & Welling 2016, Improving Variational Auto-Encoders using Householder Flow, whose encoder emits v.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_reflections: int | None = None,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.v = nn.Parameter(_near_identity(self.input_dim, num_reflections))
        self.add_hyper_network(context_dim, hidden_dims)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass("x", x, transpose=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass("y", y, transpose=True)

    def _pass(self, name: str, x: Tensor, *, transpose: bool) -> tuple[Tensor, Tensor]:
        self._check_input(name, x)
        y = _orthogonal(self.v, x, transpose=transpose)
        return y, y.new_zeros(y.shape[:-1])

    @property
    def sign(self) -> Tensor:  # type: ignore[override]
        """-1 for every reflection vector that is not zero, multiplied: an integer tensor of the batch shape."""
        return _sign_of_reflections(self.v)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, num_reflections={self.v.shape[-2]}"


# --- factors and their products with rows ---


def _positive_diagonal(raw: Tensor) -> tuple[Tensor, Tensor]:
    """`raw` `(*, D, D)` with 1 + slope_minus_one(its diagonal) on the diagonal, and the sum of that one's logarithms."""
    d = slope_minus_one(raw.diagonal(dim1=-2, dim2=-1))
    return torch.diagonal_scatter(raw, 1 + d, dim1=-2, dim2=-1), d.log1p().sum(-1)


def _apply(
    product: Callable[[Tensor], Tensor], x: Tensor, bias: Tensor | None, *, may_form: bool
) -> Tensor:
    """W x + b for `product`, a chain of matrices, multiplied out first if that is cheaper: see `FORM_ABOVE`."""
    D = x.shape[-1]
    if may_form and x.numel() >= max(4 * D * D, FORM_ABOVE):
        W = product(torch.eye(D, dtype=x.dtype, device=x.device)).mT
        return F.linear(x, W, bias)
    y = product(x)
    return y if bias is None else y + bias


def _orthogonal(V: Tensor, x: Tensor, *, transpose: bool) -> Tensor:
    """Q x, or Qᵀ x: see `ops.linalg.reflect`. Forms Q if two products with V cost more than one with Q."""
    K, D = V.shape[-2:]
    may_form = V.dim() == 2 and 2 * K > D
    return _apply(lambda rows: reflect(V, rows, transpose=transpose), x, None, may_form=may_form)


def _near_identity(dim: int, num_reflections: int | None) -> Tensor:
    """Reflection vectors `(K, D)` in pairs of nearly equal ones."""
    K = max(dim // 2 * 2, 2) if num_reflections is None else num_reflections
    K = check_positive("num_reflections", K)
    v = torch.randn((K + 1) // 2, dim).repeat_interleave(2, 0)[:K]
    return v + 0.01 * torch.randn(K, dim)


def _sign_of_reflections(v: Tensor) -> Tensor:
    return torch.where(is_zero((v * v).sum(-1)), 1, -1).prod(-1)
