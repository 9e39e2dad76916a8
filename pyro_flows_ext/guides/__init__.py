"""Flow guides: Pyro AutoGuides whose density is a normalizing flow."""

from .amortized import AutoAmortizedFlow
from .base import AutoFlow
from .flows import (
    AutoIAF,
    AutoMAF,
    AutoNSF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSylvester,
)
from .indexed import AutoCIF

__all__ = [
    "AutoAmortizedFlow",
    "AutoCIF",
    "AutoFlow",
    "AutoIAF",
    "AutoMAF",
    "AutoNSF",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoResidual",
    "AutoSylvester",
]
