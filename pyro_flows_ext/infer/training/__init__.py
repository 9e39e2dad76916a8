"""Training of guides: rounds, verdicts, checkpoints."""

from .fit import fit
from .loggers import CSVLogger, TensorBoardLogger
from .result import FitResult
from .rounds import TrainingState

__all__ = ["CSVLogger", "FitResult", "TensorBoardLogger", "TrainingState", "fit"]
