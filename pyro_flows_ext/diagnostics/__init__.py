"""How good is a guide? Importance weights, evidence, gaps, calibration, conditioning, summaries, export to ArviZ, plots."""

from ..infer import ImportanceResult, importance
from . import plots, plots_images
from .ais import AISResult, annealed_importance_sampling, log_evidence_ais
from .calibration import CalibrationResult, simulation_based_calibration
from .export import to_inference_data
from .gaps import InferenceGaps, gaps
from .netcdf import save_netcdf
from .numerics import (
    LipschitzEstimate,
    jacobian_condition_number,
    lipschitz_estimate,
    round_trip_error,
)
from .plots_calibration import rank_histogram
from .predictive import crps, pit
from .summary import ParameterSummary, flatten_samples, summary

__all__ = [
    "AISResult",
    "CalibrationResult",
    "ImportanceResult",
    "InferenceGaps",
    "LipschitzEstimate",
    "ParameterSummary",
    "annealed_importance_sampling",
    "crps",
    "flatten_samples",
    "gaps",
    "importance",
    "jacobian_condition_number",
    "lipschitz_estimate",
    "log_evidence_ais",
    "pit",
    "plots",
    "plots_images",
    "rank_histogram",
    "round_trip_error",
    "save_netcdf",
    "simulation_based_calibration",
    "summary",
    "to_inference_data",
]
