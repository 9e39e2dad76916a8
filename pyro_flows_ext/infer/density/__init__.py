"""Training of densities: data from anywhere, units, early stopping, checkpoints."""

from .fit import DensityFitResult, DensityTrainingState, fit_density

__all__ = ["DensityFitResult", "DensityTrainingState", "fit_density"]
