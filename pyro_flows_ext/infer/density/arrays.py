"""Arrays of any library as tensors."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(name: str, data: Any) -> tuple[Tensor, list[str] | None]:
    """A tensor of real numbers over the same memory where possible, and the names of the columns of a DataFrame."""
    columns = None
    if not isinstance(data, Tensor):
        if hasattr(data, "columns") and hasattr(data, "to_numpy"):
            columns = [str(column) for column in data.columns]
            _check_columns(name, data, columns)
        if hasattr(data, "toarray"):
            raise TypeError(
                f"{name}: expected a dense array, got a sparse {type(data).__name__}; call .toarray() first"
            )
        if not (hasattr(data, "__array__") or hasattr(data, "to_numpy")):
            raise TypeError(
                f"{name}: expected a tensor, an array, a DataFrame, a Dataset or a DataLoader, got a "
                f"{type(data).__name__}; torch.as_tensor makes a tensor of numbers"
            )
        data = _from_numpy(name, data)
    if data.is_complex() or data.layout != torch.strided:
        kind = "complex" if data.is_complex() else "sparse"
        raise TypeError(f"{name}: expected a dense tensor of real numbers, got a {kind} one")
    return data.detach(), columns


def _from_numpy(name: str, data: Any) -> Tensor:
    array: Any = data.to_numpy() if hasattr(data, "to_numpy") else np.asanyarray(data)
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(float), np.nan)
    if array.dtype == object:
        try:
            array = array.astype(float)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: expected numbers, got an array of objects: {error}") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected real numbers, got an array of {array.dtype}")
    if (array.dtype.kind == "u" and array.dtype.itemsize > 1) or array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # torch has few operations on these
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # A mapped file is read-only, and nothing here writes.
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(np.asarray(array))


def _check_columns(name: str, frame: Any, columns: list[str]) -> None:
    """`TypeError` that names the columns of a DataFrame that hold no numbers."""
    bad = [
        column for column, kind in zip(columns, frame.dtypes, strict=True) if not _is_number(kind)
    ]
    if bad:
        raise TypeError(
            f"{name}: expected columns of numbers, got others: {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; "
            "leave them out or encode them"
        )


def _is_number(kind: Any) -> bool:
    text = str(kind).lower()
    return text.startswith(("int", "uint", "float", "bool", "double"))
