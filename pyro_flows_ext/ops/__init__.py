"""Stateless functions on tensors."""

from .chains import bulk_ess, normal_scores, r_hat
from .checks import (
    check_automatic,
    check_context_dim,
    check_event,
    check_event_dim,
    check_positive,
    check_same_dtype,
    find_event_shape,
    not_a_tensor,
    read_event_shape,
)
from .circular_splines import circular_rq_spline, wrap
from .contraction import anderson, contraction_inverse
from .fixed_point import triangular_fixed_point
from .linalg import householder_columns, matvec, orthonormal_columns, turned_columns
from .roots import increasing_root, may_branch_on, monotone_root, tanh_root, triangular_tanh_root
from .shapes import broadcast_shapes
from .spectral import conv_norm_bound, spectral_norm_bound
from .splines import rq_spline
from .stats import effective_sample_size, pareto_smooth, quantiles
from .trace import (
    Linearizable,
    Opaque,
    Product,
    dense_jacobian,
    exact_log_det,
    log_det_series,
    neumann_log_det,
    roulette_weights,
)

__all__ = [
    "Linearizable",
    "Opaque",
    "Product",
    "anderson",
    "broadcast_shapes",
    "bulk_ess",
    "check_automatic",
    "check_context_dim",
    "check_event",
    "check_event_dim",
    "check_positive",
    "check_same_dtype",
    "circular_rq_spline",
    "contraction_inverse",
    "conv_norm_bound",
    "dense_jacobian",
    "effective_sample_size",
    "exact_log_det",
    "find_event_shape",
    "householder_columns",
    "increasing_root",
    "log_det_series",
    "matvec",
    "may_branch_on",
    "monotone_root",
    "neumann_log_det",
    "normal_scores",
    "not_a_tensor",
    "orthonormal_columns",
    "pareto_smooth",
    "quantiles",
    "r_hat",
    "read_event_shape",
    "roulette_weights",
    "rq_spline",
    "spectral_norm_bound",
    "tanh_root",
    "triangular_fixed_point",
    "triangular_tanh_root",
    "turned_columns",
    "wrap",
]
