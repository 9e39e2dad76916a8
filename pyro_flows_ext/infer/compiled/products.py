"""Small products of matrices as sums of products: compilers fuse these with what is around them, and call out for those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A call of a library costs as much as so many multiplications and more.
MOST = 1024

aten = torch.ops.aten


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k a_ik b_kj; `NotImplemented`, which leaves it to the library, where that is large."""
    (m, k), n = a.shape, b.shape[1]
    if k == 1:
        return a * b
    if m * k * n > MOST:
        return NotImplemented
    return (a.unsqueeze(-1) * b).sum(1)


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    """bias + a b."""
    product = mm(a, b) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else bias + product


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k a_nik b_nkj, of every n."""
    if a.shape[-1] == 1:
        return a * b
    if a.numel() * b.shape[-1] > MOST:
        return NotImplemented
    return (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)


# As `make_fx` takes them.
SMALL_PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: mm,
    aten.addmm.default: addmm,
    aten.bmm.default: bmm,
}
