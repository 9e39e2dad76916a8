"""Training of guides: rounds, verdicts, checkpoints."""

from .fit import fit
from .result import FitResult
from .rounds import TrainingState

__all__ = ["FitResult", "TrainingState", "fit"]
