"""How good is a guide? Importance weights, summaries, export to ArviZ, plots."""

from . import plots
from .export import save_netcdf, to_inference_data
from .importance import ImportanceResult, importance
from .summary import ParameterSummary, flatten_samples, summary

__all__ = [
    "ImportanceResult",
    "ParameterSummary",
    "flatten_samples",
    "importance",
    "plots",
    "save_netcdf",
    "summary",
    "to_inference_data",
]
