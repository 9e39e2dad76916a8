"""Warm starts: a Gaussian near a posterior in about a second, and the modes met on the way."""

from .gaussian import DenseGaussian, Gaussian, LowRankGaussian
from .modes import Mode
from .search import WarmStart, find_gaussian
from .target import Target
from .whiten import warm_start, whiten_at_posterior

__all__ = [
    "DenseGaussian",
    "Gaussian",
    "LowRankGaussian",
    "Mode",
    "Target",
    "WarmStart",
    "find_gaussian",
    "warm_start",
    "whiten_at_posterior",
]
