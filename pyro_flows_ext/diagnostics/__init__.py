"""How good is a guide? Importance weights, conditioning, summaries, export to ArviZ, plots."""

from . import plots
from .export import save_netcdf, to_inference_data
from .importance import ImportanceResult, importance
from .numerics import (
    LipschitzEstimate,
    jacobian_condition_number,
    lipschitz_estimate,
    round_trip_error,
)
from .summary import ParameterSummary, flatten_samples, summary

__all__ = [
    "ImportanceResult",
    "LipschitzEstimate",
    "ParameterSummary",
    "flatten_samples",
    "importance",
    "jacobian_condition_number",
    "lipschitz_estimate",
    "plots",
    "round_trip_error",
    "save_netcdf",
    "summary",
    "to_inference_data",
]
