"""Flow guides: Pyro AutoGuides whose density is a normalizing flow."""

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

__all__ = [
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
