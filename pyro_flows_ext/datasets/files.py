"""Data for a model from a file: name -> tensor."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Entries of a CSV that stand for a missing value, in lower case.
MISSING = {"", "na", "nan", "n/a", "null", "none"}


class Columns(dict[str, Tensor]):
    """Tensors by name. `levels`: the strings that the numbers 0, 1, ... of a factor stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.levels: dict[str, list[str]] = {}


def load_data(path: str | Path, columns: Sequence[str] | None = None) -> Columns:
    """The tensors of a `.json` (an object of numbers and nested lists), `.csv` (a header, and columns of numbers or
    strings), `.parquet` or `.npz` file, by key or column; `columns` selects some, in their order.

    Whole numbers become int64 tensors, fractions tensors of the default dtype, truth values bool. A column of strings is
    a factor: its levels in alphabetical order become 0, 1, ... An empty entry, NA or NaN among numbers is NaN. Raises
    `ValueError` for a file that cannot be read, entries that are neither numbers nor strings, columns of both, and
    missing entries of a factor.
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
    found = Columns()
    for key, value in _selected(path, arrays, columns).items():
        where = f"data {str(path)!r}, {key}"
        array = _array(where, value)
        if array.dtype.kind in "UO":
            found.levels[key], array = _factor(where, array)
        found[key] = _tensor(where, array)
    return found


def _selected(path: Path, arrays: dict[str, Any], columns: Sequence[str] | None) -> dict[str, Any]:
    if columns is None:
        return arrays
    missing = [name for name in columns if name not in arrays]
    if missing:
        raise ValueError(
            f"data {str(path)!r}: no column {', '.join(map(repr, missing))}: expected some of {', '.join(arrays)}"
        )
    return {name: arrays[name] for name in columns}


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


def _read_parquet(path: Path) -> dict[str, Any]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except ImportError as error:
        raise ValueError(
            "parquet files need pyarrow, which is not installed: pip install pyarrow"
        ) from error
    named = {str(name): frame[name] for name in frame.columns}
    return {
        name: column.to_numpy()
        if column.dtype.kind in "biuf"
        # Strings, and numbers with missing entries in pandas' own dtypes.
        else _numbers(name, tuple("" if pd.isna(entry) else str(entry) for entry in column))
        for name, column in named.items()
    }


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".npz": _read_npz,
}


def _numbers(name: str, column: tuple[str, ...]) -> list[int] | list[float] | list[str]:
    """Whole numbers if all are, fractions if all are numbers or missing, strings if none is a number."""
    try:
        return [int(entry) for entry in column]
    except ValueError:
        numbers = [_number(entry) for entry in column]
    wrong = [row for row, number in enumerate(numbers) if number is None]
    if not wrong:
        return [math.nan if number is None else number for number in numbers]
    present = [number for number in numbers if number is not None and not math.isnan(number)]
    if present:
        raise ValueError(
            f"column {name}, row {wrong[0] + 1}: expected a number as in {len(present)} other rows, got "
            f"{column[wrong[0]]!r}"
        )
    return [entry.strip() for entry in column]


def _number(entry: str) -> float | None:
    if entry.strip().lower() in MISSING:
        return math.nan
    try:
        return float(entry)
    except ValueError:
        return None


def _array(where: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{where}: expected lists of equal lengths") from None
    if array.dtype.kind == "O" and all(v is None or type(v) in (int, float) for v in array.flat):
        array = array.astype(np.float64)  # null is NaN
    if array.dtype.kind not in "biuf" and not (array.dtype.kind == "U" and array.ndim == 1):
        raise ValueError(f"{where}: expected numbers, got {array.dtype} entries")
    if array.size == 0:
        raise ValueError(f"{where}: expected at least one value")
    return array


def _factor(where: str, array: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The levels of strings, and the number of each."""
    missing = [row for row, entry in enumerate(array) if entry.strip().lower() in MISSING]
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of {len(array)} entries are missing, the first in row {missing[0] + 1}: leave such "
            "rows out, or give them a level of their own"
        )
    levels, codes = np.unique(array, return_inverse=True)
    return [str(level) for level in levels], codes


def _tensor(where: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind == "f":
        tensor = torch.tensor(array, dtype=torch.get_default_dtype())
        beyond = np.isfinite(array) & ~tensor.isfinite().numpy()
        if beyond.any():
            raise ValueError(f"{where}: {array[beyond][0]} is beyond the range of {tensor.dtype}")
        return tensor
    return torch.tensor(array if array.dtype.kind == "b" else array.astype(np.int64))


def table_bytes(suffix: str, columns: Mapping[str, Any]) -> bytes:
    """Columns of equal lengths as a `.csv` or `.parquet` file; raises `ValueError` where pandas lacks what it needs."""
    import pandas as pd

    buffer = io.BytesIO()
    frame = pd.DataFrame(columns)
    if suffix == ".csv":
        frame.to_csv(buffer, index=False)
        return buffer.getvalue()
    try:
        frame.to_parquet(buffer, index=False)
    except ImportError as error:
        raise ValueError(
            "parquet files need pyarrow, which is not installed: pip install pyarrow"
        ) from error
    return buffer.getvalue()
