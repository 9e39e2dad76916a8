"""Flow guides: Pyro AutoGuides whose density is a normalizing flow."""

from .amortized import AutoAmortizedFlow
from .cif import AutoCIF
from .flows import (
    AutoFlow,
    AutoIAF,
    AutoMAF,
    AutoNSF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSylvester,
)
from .hamiltonian import AutoHamiltonian
from .reparam import CircularReparam

__all__ = [
    "AutoAmortizedFlow",
    "AutoCIF",
    "AutoFlow",
    "AutoHamiltonian",
    "AutoIAF",
    "AutoMAF",
    "AutoNSF",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoResidual",
    "AutoSylvester",
    "CircularReparam",
]
