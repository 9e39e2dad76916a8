"""Bounds on the evidence as Pyro ELBOs."""

from .annealed import AnnealedELBO, cosine, linear, rezende
from .importance_weighted import ImportanceWeightedELBO
from .path_gradients import CutMessenger, has_parameters, through_draws

__all__ = [
    "AnnealedELBO",
    "CutMessenger",
    "ImportanceWeightedELBO",
    "cosine",
    "has_parameters",
    "linear",
    "rezende",
    "through_draws",
]
