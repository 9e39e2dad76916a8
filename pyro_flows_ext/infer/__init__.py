"""Training of guides and densities: bounds, annealing, warm starts, and what came of it."""

from .compiled import CompiledSVI
from .density import DensityFitResult, DensityTrainingState, fit_density
from .elbo import AnnealedELBO, ImportanceWeightedELBO, cosine, linear, rezende
from .importance import ImportanceResult, importance
from .refine import RefineResult, refine
from .training import CSVLogger, FitResult, TensorBoardLogger, TrainingState, fit
from .warm_start import WarmStart, warm_start

__all__ = [
    "AnnealedELBO",
    "CSVLogger",
    "CompiledSVI",
    "DensityFitResult",
    "DensityTrainingState",
    "FitResult",
    "ImportanceResult",
    "ImportanceWeightedELBO",
    "RefineResult",
    "TensorBoardLogger",
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
