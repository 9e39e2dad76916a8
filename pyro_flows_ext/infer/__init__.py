"""Training guides."""

from .training import FitResult, fit

__all__ = ["FitResult", "fit"]
