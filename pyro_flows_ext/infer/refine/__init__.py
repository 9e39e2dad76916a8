"""Many short chains of HMC in the coordinates of a guide: the verdict on its draws, and better ones."""

from .adaptation import Tuning
from .chains import ChainResult, run_chains
from .coordinates import Start, start_at
from .drift import Drift, drift_from, drift_within
from .modes import UncoveredMode, uncovered
from .refine import refine, refine_density, verify
from .result import RefineResult

__all__ = [
    "ChainResult",
    "Drift",
    "RefineResult",
    "Start",
    "Tuning",
    "UncoveredMode",
    "drift_from",
    "drift_within",
    "refine",
    "refine_density",
    "run_chains",
    "start_at",
    "uncovered",
    "verify",
]
