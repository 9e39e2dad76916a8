"""Training of densities: data from anywhere, units, early stopping, checkpoints."""

from .fit import fit_density
from .result import DensityFitResult
from .run import DensityTrainingState

__all__ = ["DensityFitResult", "DensityTrainingState", "fit_density"]
