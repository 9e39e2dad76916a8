"""Data for a model from a file: name -> tensor."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def load_data(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.json` (an object of numbers and nested lists), `.csv` (a header and columns of numbers) or
    `.npz` file, by key or column.

    Whole numbers become int64 tensors, fractions tensors of the default dtype, truth values bool. Raises `ValueError`
    for a file that cannot be read, entries that are no numbers, and NaN or infinite values, naming the key and how
    many there are.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"data {str(path)!r}: expected a file that ends in {', '.join(_READERS)}")
    try:
        arrays = reader(path)
    except OSError as error:
        raise ValueError(f"data {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"data {str(path)!r}: {error}") from error
    return {key: _tensor(f"data {str(path)!r}, {key}", value) for key, value in arrays.items()}


def scikit_learn_datasets() -> Any:
    """`sklearn.datasets`; `ValueError` where it is not installed."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "this target's data come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    return datasets


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"expected an object of names and numbers, got {type(values).__name__}")
    return values


def _read_csv(path: Path) -> dict[str, Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise ValueError("expected a header and at least one row")
    header = [name.strip() for name in rows[0]]
    if repeated := {name for name in header if header.count(name) > 1}:
        raise ValueError(f"columns named twice: {', '.join(sorted(repeated))}")
    for i, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise ValueError(f"row {i} has {len(row)} entries, the header {len(header)}")
    columns = zip(*rows[1:], strict=True)
    return {name: _numbers(name, column) for name, column in zip(header, columns, strict=True)}


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".json": _read_json,
    ".csv": _read_csv,
    ".npz": _read_npz,
}


def _numbers(name: str, column: tuple[str, ...]) -> list[int] | list[float]:
    """Whole numbers if all are, fractions otherwise."""
    try:
        return [int(entry) for entry in column]
    except ValueError:
        return [_number(f"column {name}, row {row}", entry) for row, entry in enumerate(column, 1)]


def _number(where: str, entry: str) -> float:
    try:
        return float(entry)
    except ValueError:
        raise ValueError(f"{where}: expected a number, got {entry!r}") from None


def _tensor(where: str, value: Any) -> Tensor:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{where}: expected lists of equal lengths") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected numbers, got {array.dtype} entries")
    if array.size == 0:
        raise ValueError(f"{where}: expected at least one value")
    if array.dtype.kind != "f":
        return torch.tensor(array if array.dtype.kind == "b" else array.astype(np.int64))
    tensor = torch.tensor(array, dtype=torch.get_default_dtype())
    bad = (~tensor.isfinite()).flatten().nonzero()
    if len(bad):
        raise ValueError(
            f"{where}: {len(bad)} of {array.size} values are NaN or infinite, the first at position {bad[0].item()}"
        )
    return tensor
