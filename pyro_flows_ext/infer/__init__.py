"""Training guides: bounds, annealing, and where to begin."""

from .annealing import AnnealedELBO, cosine, linear, rezende
from .importance import ImportanceWeightedELBO
from .training import FitResult, fit
from .warm_start import WarmStart, warm_start

__all__ = [
    "AnnealedELBO",
    "FitResult",
    "ImportanceWeightedELBO",
    "WarmStart",
    "cosine",
    "fit",
    "linear",
    "rezende",
    "warm_start",
]
