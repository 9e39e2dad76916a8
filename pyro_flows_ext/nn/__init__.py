"""Networks that emit parameters."""

from .hyper import HyperNetwork
from .mlp import MLP

__all__ = ["MLP", "HyperNetwork"]
