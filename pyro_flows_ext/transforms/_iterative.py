"""Which transforms invert, or where they are turned round draw, by sweeps or root finding."""

from ._low_rank import LowRankTanh
from .autoregressive import Autoregressive

ITERATIVE = (Autoregressive, LowRankTanh)
