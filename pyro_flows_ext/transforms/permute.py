"""Permutations of the coordinates, as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FlowTransform


class Permute(FlowTransform):
    """y_i = x_π(i) for a fixed permutation π of the coordinates; log|det| = 0, and `sign` is π's parity.

    Args:
        permutation: π(0), ..., π(D - 1); becomes a buffer.

    Raises:
        ValueError: unless every number from 0 to D - 1 comes once.

    Example:
        >>> Permute([1, 2, 0])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([11., 12., 10.])
    """

    permutation: Tensor

    def __init__(self, permutation: Tensor | Sequence[int]):
        super().__init__()
        permutation = torch.as_tensor(permutation)
        D = permutation.numel()
        if permutation.dim() != 1 or D == 0 or permutation.sort()[0].tolist() != list(range(D)):
            raise ValueError(
                f"permutation: expected each of 0 to D - 1 once, in one dimension, got {permutation.tolist()}"
            )
        self.input_dim = D
        self.register_buffer("permutation", permutation.detach().long().clone())

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        return y.index_select(-1, self.permutation.argsort()), y.new_zeros(y.shape[:-1])

    @property
    def sign(self) -> int:
        return parity(self.permutation)

    def extra_repr(self) -> str:
        return f"{self.input_dim}"


def parity(permutation: Tensor) -> int:
    """+1 for an even number of inversions, -1 for an odd one."""
    inversions = (permutation.unsqueeze(-1) > permutation).triu(1).sum()
    return 1 - 2 * int(inversions % 2)
