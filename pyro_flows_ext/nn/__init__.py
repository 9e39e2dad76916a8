"""Networks that emit parameters."""

from .hyper import HyperNetwork
from .made import MADE
from .mlp import MLP

__all__ = ["MADE", "MLP", "HyperNetwork"]
