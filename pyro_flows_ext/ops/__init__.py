"""Stateless functions on tensors."""

from .linalg import householder_columns, matvec, orthonormal_columns
from .roots import monotone_root, tanh_root, triangular_tanh_root
from .stats import effective_sample_size, pareto_smooth

__all__ = [
    "effective_sample_size",
    "householder_columns",
    "matvec",
    "monotone_root",
    "orthonormal_columns",
    "pareto_smooth",
    "tanh_root",
    "triangular_tanh_root",
]
