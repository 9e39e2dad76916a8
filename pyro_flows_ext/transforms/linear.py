"""Linear layers whose log-det costs O(D): LU and QR factors, products of reflections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import matvec
from ..ops.linalg import is_zero, reflect, solve_triangular
from ._constrain import check_event, check_positive, slope_minus_one
from .base import FlowTransform
from .conditional import ConditionalFlow
from .permute import parity

# A batch of as many numbers (and of four times as many rows as columns) is worth multiplying out the factors for: on
# one core, 1.3 (LU) to 2 times (QR) faster than a product with each factor, and 1.1 times slower on smaller batches.
FORM_ABOVE = 2**15


class LULinear(FlowTransform):
    """y = P (L U x + b) with P a fixed permutation, L unit lower and U upper triangular with a positive diagonal.

    log|det| = Σ log U_ii, exact. U_ii lies above 1e-3 for any parameter value, so the layer is always invertible.
    Starts at the identity, or at P with `permute=True`: a random P, drawn once from torch's generator, with which L
    and U reach matrices that they alone do not (the zero in [[0, 1], [1, 0]] has no LU factors). `sign` is P's parity.

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters: `lu` `(D, D)`, L below its diagonal, U on and above; `bias`
    `(D)` unless `bias=False`. Buffer: `permutation` `(D)`, with `permute=True`.
    Cost: O(D²) a row in both directions; the inverse is two triangular solves for the whole batch. Nothing is factored
    or inverted, and nothing cached, in eval mode either: what depends on the parameters alone is half of the smallest
    pass at most.
    Raises `ValueError` when the last dimension is not D.

    Source: Oliva et al. 2018, Transformation Autoregressive Networks; with the fixed permutation, Kingma & Dhariwal
    2018, Glow.
    """

    bias: Tensor | None
    permutation: Tensor | None

    def __init__(self, input_dim: int, *, bias: bool = True, permute: bool = False):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.lu = nn.Parameter(torch.zeros(D, D))
        self.register_parameter("bias", nn.Parameter(torch.zeros(D)) if bias else None)
        self.register_buffer("permutation", torch.randperm(D) if permute else None)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        LU, ladj = _positive_diagonal(self.lu)
        L, U = LU.tril(-1), LU.triu()

        def product(rows: Tensor) -> Tensor:
            h = matvec(U, rows)
            return self._permuted(h + matvec(L, h))

        bias = None if self.bias is None else self._permuted(self.bias)
        y = _apply(product, x, bias, may_form=LU.dim() == 2)
        return y, ladj.expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
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
    number starts as a random mirror. `num_reflections=None` is 2 ⌊D / 2⌋ (at least 2), with which Q reaches every
    rotation, and QR every matrix of positive determinant. `sign` as in `HouseholderLinear`.

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters: `v` `(K, D)`, one reflection a row; `r` `(D, D)`, read on and
    above its diagonal alone; `bias` `(D)` unless `bias=False`.
    Cost: O(K² D) a pass and O(KD + D²) a row in both directions; the inverse is Qᵀ and one triangular solve for the
    whole batch. Nothing is cached, as in `LULinear`.
    Raises `ValueError` when the last dimension is not D.

    Source: Hoogeboom, van den Berg & Welling 2019, Emerging Convolutions for Generative Normalizing Flows.
    """

    bias: Tensor | None

    def __init__(self, input_dim: int, *, num_reflections: int | None = None, bias: bool = True):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        self.v = nn.Parameter(_near_identity(D, num_reflections))
        self.r = nn.Parameter(torch.zeros(D, D))
        self.register_parameter("bias", nn.Parameter(torch.zeros(D)) if bias else None)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        R, ladj = _positive_diagonal(self.r)
        R = R.triu()
        may_form = R.dim() == 2 and self.v.dim() == 2
        y = _apply(lambda rows: reflect(self.v, matvec(R, rows)), x, self.bias, may_form=may_form)
        return y, ladj.expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
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

    Starts as `QRLinear` does, and `num_reflections=None` means the same. The transpose is the inverse. `sign` `(*)` is
    a tensor, (-1)^K unless some v_i is zero: that one reflects nothing, and only the values can tell.

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters: `v` `(K, D)`, one reflection a row.
    Cost: O(K² D) a pass and O(KD) a row in both directions: all K reflections are taken in one piece, not in turn.
    Raises `ValueError` when the last dimension is not D.

    Source: Tomczak & Welling 2016, Improving Variational Auto-Encoders using Householder Flow.
    """

    def __init__(self, input_dim: int, *, num_reflections: int | None = None):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.v = nn.Parameter(_near_identity(self.input_dim, num_reflections))

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass("x", x, transpose=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass("y", y, transpose=True)

    def _pass(self, name: str, x: Tensor, *, transpose: bool) -> tuple[Tensor, Tensor]:
        check_event(name, x, self.input_dim)
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
    """W x + b for `product`, a chain of matrices, multiplied out first where that pays: see `FORM_ABOVE`."""
    D = x.shape[-1]
    if may_form and x.numel() >= max(4 * D * D, FORM_ABOVE):
        W = product(torch.eye(D, dtype=x.dtype, device=x.device)).mT
        return F.linear(x, W, bias)
    y = product(x)
    return y if bias is None else y + bias


def _orthogonal(V: Tensor, x: Tensor, *, transpose: bool) -> Tensor:
    """Q x, or Qᵀ x: see `ops.linalg.reflect`. Q itself is worth forming when a product with V twice costs more than one with Q."""
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


# --- conditional forms ---


class _ConditionalLinear(ConditionalFlow):
    """Takes the keywords of `base`, the transform whose parameters depend on the context."""

    base: Callable[..., FlowTransform]

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        **options: int | None,
    ):
        super().__init__(self.base(input_dim, **options), context_dim, hidden_dims)


class ConditionalLULinear(_ConditionalLinear):
    """`LULinear` whose L, U and b depend on a context `(*, C)`; `.condition(context)` gives the transform.

    P stays fixed. The hyper-network's last layer emits D² + D numbers a datum.
    """

    base = LULinear


class ConditionalQRLinear(_ConditionalLinear):
    """`QRLinear` whose Q, R and b depend on a context `(*, C)`; `.condition(context)` gives the transform.

    The hyper-network's last layer emits D² + KD + D numbers a datum.
    """

    base = QRLinear


class ConditionalHouseholderLinear(_ConditionalLinear):
    """`HouseholderLinear` whose reflections depend on a context `(*, C)`; `.condition(context)` gives the transform.

    This is the flow of Tomczak & Welling (2016), whose encoder emits the vectors. The hyper-network's last layer
    emits KD numbers a datum.
    """

    base = HouseholderLinear


# --- helpers ---


def lu_linear(input_dim: int, *, bias: bool = True, permute: bool = False) -> LULinear:
    """A linear layer by its LU factors: see `LULinear`."""
    return LULinear(input_dim, bias=bias, permute=permute)


def qr_linear(input_dim: int, *, num_reflections: int | None = None, bias: bool = True) -> QRLinear:
    """A linear layer by its QR factors: see `QRLinear`."""
    return QRLinear(input_dim, num_reflections=num_reflections, bias=bias)


def householder_linear(input_dim: int, *, num_reflections: int | None = None) -> HouseholderLinear:
    """An orthogonal layer of `num_reflections` reflections: see `HouseholderLinear`."""
    return HouseholderLinear(input_dim, num_reflections=num_reflections)


def conditional_lu_linear(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **options: bool
) -> ConditionalLULinear:
    """`lu_linear`, with its keywords, amortized over a context: see `ConditionalLULinear`."""
    return ConditionalLULinear(input_dim, context_dim, hidden_dims, **options)


def conditional_qr_linear(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: int | None,
) -> ConditionalQRLinear:
    """`qr_linear`, with its keywords, amortized over a context: see `ConditionalQRLinear`."""
    return ConditionalQRLinear(input_dim, context_dim, hidden_dims, **options)


def conditional_householder_linear(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: int | None,
) -> ConditionalHouseholderLinear:
    """`householder_linear`, with its keyword, amortized over a context: see `ConditionalHouseholderLinear`."""
    return ConditionalHouseholderLinear(input_dim, context_dim, hidden_dims, **options)
