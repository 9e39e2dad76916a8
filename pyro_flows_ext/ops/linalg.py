"""Linear algebra for flows: orthonormal bases from unconstrained tensors, and products that broadcast."""

from __future__ import annotations

import torch
from torch import Tensor


def matvec(A: Tensor, x: Tensor) -> Tensor:
    """A x for `A: (*, M, N)` and `x: (*, N)` -> `(*, M)`; one matrix product when A is not batched."""
    if A.dim() == 2:
        return x @ A.mT
    return (A @ x.unsqueeze(-1)).squeeze(-1)


def orthonormal_columns(A: Tensor) -> Tensor:
    """Q of A = QR with a positive diagonal in R: Gram-Schmidt on the columns of `A: (*, D, M)`, M <= D.

    LAPACK leaves the signs of R's diagonal free, and they jump when an entry of A changes sign; fixing them makes Q a
    continuous function of A, so that an optimizer step never flips a column. Exact to machine precision; O(D M²).
    """
    Q, R = torch.linalg.qr(A)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def householder_columns(V: Tensor, num_columns: int | None = None) -> Tensor:
    """The first columns of the product of reflections H_1 ... H_K, H_i = I - 2 v_i v_iᵀ / ‖v_i‖².

    `V: (*, K, D)` holds one reflection vector a row; the result is `(*, D, num_columns)`, all D columns by default,
    and orthonormal for any V: a vector of zeros reflects nothing. The product is taken in one piece as
    I - Uᵀ T U with T⁻¹ = triu(U Uᵀ, 1) + I / 2 and U the normalised rows (the UT transform, Joffrain et al. 2006,
    Accumulating Householder transformations, revisited), not as K products in turn. O(K² D + K D num_columns).
    """
    K, D = V.shape[-2:]
    num_columns = D if num_columns is None else num_columns
    square = (V * V).sum(-1, keepdim=True)
    is_zero = square == 0
    U = torch.where(is_zero, 0.0, V * torch.where(is_zero, 1.0, square).rsqrt())
    eye = torch.eye(D, dtype=V.dtype, device=V.device)
    T_inv = (U @ U.mT).triu(1) + 0.5 * eye.new_ones(K).diag()
    return (
        eye[:, :num_columns]
        - U.mT @ torch.linalg.solve_triangular(T_inv, U, upper=True)[..., :num_columns]
    )
