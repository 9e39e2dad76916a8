"""Linear algebra for flows: orthonormal bases from unconstrained tensors, and products that broadcast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def matvec(A: Tensor, x: Tensor) -> Tensor:
    """Returns A x, `(*, M)`: one matrix product if A is not batched, one for each A otherwise.

    Args:
        A: `(*, M, N)`.
        x: `(*, N)`, broadcast against A.

    Example:
        >>> matvec(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.ones(2))
        tensor([3., 1.])
    """
    if A.dim() == 2:
        return x @ A.mT
    return _by_columns(lambda columns: A @ columns, A, x)


def _by_columns(product: Callable[[Tensor], Tensor], A: Tensor, x: Tensor) -> Tensor:
    """`product` `(*, N, K) -> (*, M, K)` of x `(*, N)`: the dimensions that x has and a batch of A has not are columns."""
    outer = x.dim() + 1 - A.dim()
    if outer <= 0:
        return product(x.unsqueeze(-1)).squeeze(-1)
    columns = x.flatten(0, outer - 1).movedim(0, -1)
    return product(columns).movedim(-1, 0).unflatten(0, x.shape[:outer])


def orthonormal_columns(A: Tensor) -> Tensor:
    """Returns Q of A = QR with a positive diagonal in R: Gram-Schmidt on the columns of A.

    LAPACK leaves the signs of R's diagonal free, and they jump when an entry of A changes sign. Fixing them makes Q a
    continuous function of A, so that an optimizer step never flips a column. Exact to machine precision; O(D M²).

    Args:
        A: `(*, D, M)`, M <= D.

    Example:
        >>> Q = orthonormal_columns(torch.randn(4, 2))
        >>> torch.allclose(Q.mT @ Q, torch.eye(2), atol=1e-5)
        True
    """
    Q, R = torch.linalg.qr(A)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def turned_columns(Q: Tensor, V: Tensor) -> Tensor:
    """Returns (I - A/2)⁻¹ (I + A/2) Q with A = V Qᵀ - Q Vᵀ: Q turned towards Q + V.

    A is antisymmetric, so that I - A/2 is never singular, and the result and its derivatives in V are bounded. To first
    order it is Q + (V - Q Vᵀ Q). O(D³).

    Args:
        Q: `(*, D, M)`, with orthonormal columns.
        V: `(*, D, M)`, any values.

    Returns:
        `(*, D, M)`, with orthonormal columns.

    Example:
        >>> turned_columns(torch.eye(3)[:, :2], torch.zeros(3, 2)).shape
        torch.Size([3, 2])

    References:
        Wen & Yin 2013, A feasible method for optimization with orthogonality constraints (the Cayley transform).
    """
    half = (V @ Q.mT) / 2
    half = half - half.mT
    eye = torch.eye(Q.shape[-2], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye - half, Q + half @ Q)


def householder_columns(V: Tensor, num_columns: int | None = None) -> Tensor:
    """Returns the first columns of the product of reflections H_1 ... H_K, H_i = I - 2 v_i v_iᵀ / ‖v_i‖².

    The product is taken in one piece as I - Uᵀ T U with T⁻¹ = triu(U Uᵀ, 1) + I / 2 and U the normalised rows (the UT
    transform), not as K products in turn. O(K² D + K D num_columns).

    Args:
        V: `(*, K, D)`, one reflection vector a row; a vector of zeros reflects nothing.
        num_columns: number of columns; D by default.

    Returns:
        `(*, D, num_columns)`, orthonormal for any V.

    Example:
        >>> householder_columns(torch.tensor([[1.0, 0.0]]))
        tensor([[-1.,  0.],
                [ 0.,  1.]])

    References:
        Joffrain et al. 2006, Accumulating Householder transformations, revisited.
    """
    K, D = V.shape[-2:]
    num_columns = D if num_columns is None else num_columns
    square = (V * V).sum(-1, keepdim=True)
    zero = is_zero(square)
    U = torch.where(zero, 0.0, V * torch.where(zero, 1.0, square).rsqrt())
    eye = torch.eye(D, dtype=V.dtype, device=V.device)
    T_inv = (U @ U.mT).triu(1) + 0.5 * eye.new_ones(K).diag()
    return (
        eye[:, :num_columns]
        - U.mT @ torch.linalg.solve_triangular(T_inv, U, upper=True)[..., :num_columns]
    )


def reflect(V: Tensor, x: Tensor, *, transpose: bool = False) -> Tensor:
    """Returns Q x, or Qᵀ x, for the product Q = H_1 ... H_K of reflections; neither Q nor its factors are formed.

    Q = I - Vᵀ T V, where T⁻¹ has the upper triangle of V Vᵀ, with half its diagonal. `householder_columns` returns Q.

    Args:
        V: `(*, K, D)`, one reflection vector a row.
        x: `(*, D)`, broadcast against V.
        transpose: whether to apply Qᵀ.

    References:
        Joffrain et al. 2006, Accumulating Householder transformations, revisited.
    """
    square = (V * V).sum(-1)
    # The row of a zero vector is zero in V and V Vᵀ alike, and any number but zero on the diagonal lets it reflect nothing.
    half = torch.where(is_zero(square), 1.0, 0.5 * square)
    s = matvec(V, x)
    if V.shape[-2] == 1:
        s = s / half
    else:
        T_inv = torch.diagonal_scatter(V @ V.mT, half, dim1=-2, dim2=-1)
        s = solve_triangular(T_inv.mT if transpose else T_inv, s, upper=not transpose)
    return x + matvec(V.mT, -s)


def is_zero(square: Tensor) -> Tensor:
    """Whether a squared length is too small to be divided by."""
    return square < torch.finfo(square.dtype).tiny


def solve_triangular(A: Tensor, b: Tensor, *, upper: bool, unitriangular: bool = False) -> Tensor:
    """A⁻¹ b for triangular `A: (*, M, M)` and `b: (*, M)` -> `(*, M)`; A's other triangle is not read."""
    options = {"unitriangular": unitriangular}
    if A.dim() > 2:
        return _by_columns(
            lambda columns: torch.linalg.solve_triangular(A, columns, upper=upper, **options), A, b
        )
    # Right-hand sides as rows: one triangular solve for the whole batch.
    rows = b.reshape(-1, b.shape[-1])
    x = torch.linalg.solve_triangular(A.mT, rows, upper=not upper, left=False, **options)
    return x.reshape(b.shape)
