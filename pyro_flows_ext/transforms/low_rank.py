"""The layer that planar and Sylvester flows share: x + B tanh(Ax + b), invertible because AB is triangular."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import check_positive, matvec, tanh_root, triangular_tanh_root
from .base import FlowTransform


class LowRankTanh(FlowTransform):
    """y = x + B tanh(Ax + b), `num_layers` times in a row, with AB upper triangular and (AB)_ii > -1.

    By the matrix determinant lemma det(I + B diag(h') A) = det(I + diag(h') AB), which the triangle reduces to
    log|det| = Σ_i log(1 + (AB)_ii (1 - tanh²(Ax + b)_i)). A subclass has the parameter `b` `(K, M)` and constrains
    the other ones of all K layers at once in `_factors`.
    """

    b: Tensor
    inverts_iteratively = True

    def __init__(self, input_dim: int, num_layers: int):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.num_layers = check_positive("num_layers", num_layers)

    @abstractmethod
    def _factors(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
        """For each layer A `(*, M, D)` and Bᵀ `(*, M, D)`, and the diagonal of AB for all of them `(*, K, M)`."""

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        A, Bt, k = self._factors()
        hs = []
        for A_l, Bt_l, b_l in zip(A, Bt, layers(self.b, -2), strict=True):
            h = _add_matvec(b_l, A_l, x).tanh()
            x = _add_matvec(x, Bt_l.mT, h)
            hs.append(h)
        return x, _ladj(k, hs)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        A, Bt, k = self._factors()
        hs = []
        for A_l, Bt_l, b_l in reversed(list(zip(A, Bt, layers(self.b, -2), strict=True))):
            # With p = Ax + b, y = x + B tanh(p) gives p + AB tanh(p) = Ay + b: M unknowns, and triangular.
            h = _root((A_l @ Bt_l.mT).triu(), _add_matvec(b_l, A_l, y)).tanh()
            y = _add_matvec(y, Bt_l.mT, -h)
            hs.append(h)
        return y, -_ladj(k, hs[::-1])

    def extra_repr(self) -> str:
        return f"{self.input_dim}, num_layers={self.num_layers}"


def layers(stacked: Tensor, dim: int) -> Sequence[Tensor]:
    """The slices along `dim`; a single one is a view, which spares the copies in the gradient of `unbind`."""
    return [stacked.squeeze(dim)] if stacked.shape[dim] == 1 else stacked.unbind(dim)


def _add_matvec(x: Tensor, A: Tensor, v: Tensor) -> Tensor:
    """x + A v for `v: (*, N)`, in one kernel for a batch of vectors and one A (its gradients are products too)."""
    if A.dim() == 2 and v.dim() == 2:
        return torch.addmm(x, v, A.mT)
    return x + matvec(A, v)


def _root(K: Tensor, q: Tensor) -> Tensor:
    if K.shape[-1] == 1:
        return tanh_root(K[..., 0], q)
    return triangular_tanh_root(K, q)


def _ladj(k: Tensor, hs: Sequence[Tensor]) -> Tensor:
    h = torch.stack(list(hs), -2) if len(hs) > 1 else hs[0].unsqueeze(-2)
    return torch.addcmul(k, k, h.square(), value=-1).log1p().sum((-2, -1))
