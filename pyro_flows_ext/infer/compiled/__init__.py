"""Training steps as compiled graphs: `CompiledSVI`, and `CompiledTraining` for a loop with an optimizer of its own."""

from .steps import CompiledSVI, CompiledTraining
from .unsupported import UnsupportedForCompilation

__all__ = ["CompiledSVI", "CompiledTraining", "UnsupportedForCompilation"]
