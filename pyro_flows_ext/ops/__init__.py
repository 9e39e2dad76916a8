"""Stateless functions on tensors."""

from .fixed_point import triangular_fixed_point
from .linalg import householder_columns, matvec, orthonormal_columns
from .roots import monotone_root, tanh_root, triangular_tanh_root
from .splines import rq_spline
from .stats import effective_sample_size, pareto_smooth

__all__ = [
    "effective_sample_size",
    "householder_columns",
    "matvec",
    "monotone_root",
    "orthonormal_columns",
    "pareto_smooth",
    "rq_spline",
    "tanh_root",
    "triangular_fixed_point",
    "triangular_tanh_root",
]
