"""Callbacks that write the numbers of a run: to a CSV file, or for TensorBoard."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any, Protocol


class Recorded(Protocol):
    """A state of training with numbers by name, the step among them."""

    def record(self) -> dict[str, float]:
        """The numbers."""


class CSVLogger:
    """A callback of `fit` and `fit_density` that appends a row of numbers to a CSV file at every call.

    The columns are those of `state.record()`: step, loss, and of `fit_density` validation_loss and best_loss, of `fit`
    round, ess and k_hat. An existing file of these columns goes on, as after `resume=True`.

    Args:
        path: the file.

    Raises:
        ValueError: the file exists with other columns.

    Example:
        >>> fit_density(density, data, callback=CSVLogger("losses.csv"))  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._is_begun = False

    def __call__(self, state: Recorded) -> None:
        row = state.record()
        if not self._is_begun:
            self._begin(list(row))
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(
                "" if isinstance(value, float) and math.isnan(value) else value
                for value in row.values()
            )

    def _begin(self, columns: list[str]) -> None:
        """Writes the header, or checks the one that is there."""
        self._is_begun = True
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open(newline="") as file:
                found = next(csv.reader(file))
            if found != columns:
                raise ValueError(
                    f"{self.path}: expected a file with the columns {', '.join(columns)}, got {', '.join(found)}; name a new one"
                )
            return
        with self.path.open("w", newline="") as file:
            csv.writer(file).writerow(columns)


class TensorBoardLogger:
    """A callback of `fit` and `fit_density` that writes numbers for TensorBoard at every call.

    The numbers are those of `CSVLogger`, each but the step a scalar by step.

    Args:
        directory: of the event files.

    Raises:
        ImportError: `tensorboard` is not installed.

    Example:
        >>> fit_density(density, data, callback=TensorBoardLogger("runs/first"))  # doctest: +SKIP
    """

    def __init__(self, directory: str | os.PathLike[str]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLogger: expected the package tensorboard, which is not installed: pip install tensorboard, or "
                "use CSVLogger"
            ) from error
        self.writer: Any = SummaryWriter(os.fspath(directory))

    def __call__(self, state: Recorded) -> None:
        row = state.record()
        step = int(row.pop("step"))
        for name, value in row.items():
            if not math.isnan(value):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()
