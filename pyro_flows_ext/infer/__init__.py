"""Training guides and densities: bounds, annealing, and where to begin."""

from .compiled import CompiledSVI
from .density import DensityFitResult, DensityTrainingState, fit_density
from .elbo import AnnealedELBO, ImportanceWeightedELBO, cosine, linear, rezende
from .importance import ImportanceResult, importance
from .refine import RefineResult, refine
from .training import FitResult, TrainingState, fit
from .warm_start import WarmStart, warm_start

__all__ = [
    "AnnealedELBO",
    "CompiledSVI",
    "DensityFitResult",
    "DensityTrainingState",
    "FitResult",
    "ImportanceResult",
    "ImportanceWeightedELBO",
    "RefineResult",
    "TrainingState",
    "WarmStart",
    "cosine",
    "fit",
    "fit_density",
    "importance",
    "linear",
    "refine",
    "rezende",
    "warm_start",
]
