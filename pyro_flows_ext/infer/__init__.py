"""Training guides and densities: bounds, annealing, and where to begin."""

from .annealing import AnnealedELBO, cosine, linear, rezende
from .compiled import CompiledSVI
from .density_training import DensityFitResult, fit_density
from .importance import ImportanceWeightedELBO
from .training import FitResult, fit
from .warm_start import WarmStart, warm_start

__all__ = [
    "AnnealedELBO",
    "CompiledSVI",
    "DensityFitResult",
    "FitResult",
    "ImportanceWeightedELBO",
    "WarmStart",
    "cosine",
    "fit",
    "fit_density",
    "linear",
    "rezende",
    "warm_start",
]
