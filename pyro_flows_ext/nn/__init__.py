"""Networks that emit parameters."""

from .convnet import GatedConvNet, ResidualConvNet
from .hyper import HyperNetwork
from .lipschitz import LipschitzConvNet, LipschitzMLP, LipSwish
from .made import MADE
from .mlp import MLP, AngleMLP, ResidualMLP

__all__ = [
    "MADE",
    "MLP",
    "AngleMLP",
    "GatedConvNet",
    "HyperNetwork",
    "LipSwish",
    "LipschitzConvNet",
    "LipschitzMLP",
    "ResidualConvNet",
    "ResidualMLP",
]
