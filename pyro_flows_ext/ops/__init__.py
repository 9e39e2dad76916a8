"""Stateless functions on tensors."""

from .linalg import householder_columns, matvec, orthonormal_columns
from .roots import monotone_root, tanh_root, triangular_tanh_root

__all__ = [
    "householder_columns",
    "matvec",
    "monotone_root",
    "orthonormal_columns",
    "tanh_root",
    "triangular_tanh_root",
]
