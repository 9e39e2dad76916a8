"""Rows to learn a density of: points on the plane, sets of scikit-learn, or a file; and their split in three."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributions import TOYS
from ..programs import describe_nonfinite
from .files import load_data
from .scikit import scikit_learn_datasets

# A standard error takes two rows of validation and of test data, which are a tenth each.
MIN_ROWS = 20
TABLES = (".csv", ".parquet")
SHARE = 0.1


@dataclass(frozen=True)
class Rows:
    """Data `(N, D)`, with a name for each column.

    Attributes:
        image_shape: `(C, H, W)` of a row that is an image.
        num_levels: L for whole numbers 0 ... L - 1 by nature, else None.
        entropy: of the distribution that the rows come from, in nats, where it is known.
        context: `(N, C)`, what each row depends on, with the names in `context_columns`; None for none.
    """

    name: str
    values: Tensor
    columns: tuple[str, ...]
    image_shape: tuple[int, int, int] | None = None
    num_levels: int | None = None
    entropy: float | None = None
    context: Tensor | None = None
    context_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Rows `(N, D)`, and their contexts `(N, C)` or None."""

    values: Tensor
    context: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def reshape(self, event_shape: Sequence[int]) -> Part:
        """The rows as events of a shape."""
        return Part(self.values.reshape(len(self), *event_shape), self.context)


class Split(NamedTuple):
    """The rows to train on, to stop by, and to test with."""

    train: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class NamedRows:
    """A set by name: `load(num_rows, seed)`. Sets that are not drawn ignore both arguments."""

    load: Callable[[int, int], Rows]
    description: str


def load_rows(
    spec: str,
    *,
    num_rows: int = 10_000,
    seed: int = 0,
    key: str | None = None,
    columns: Sequence[str] | None = None,
    context: Sequence[str] | None = None,
    min_rows: int = MIN_ROWS,
) -> Rows:
    """The rows that `spec` names: a set in `DATASETS`, or a .csv, .parquet or .npz file.

    Args:
        spec: the name or file.
        num_rows, seed: of sets that are drawn.
        key: the array of an .npz with several, of shape `(N)`, `(N, D)`, or `(N, H, W)` and `(N, C, H, W)` for images.
        columns: those of a table to take; by default all that are not in `context`.
        context: columns of a table that the others depend on.
        min_rows: the fewest rows.

    Raises:
        ValueError: for names that are not there, entries that are no finite numbers, and too few rows.
    """
    name = spec.replace("_", "-")
    if name in DATASETS:
        if key is not None or columns is not None or context is not None:
            raise ValueError(f"{spec}: expected key, columns and context with a file only")
        rows = DATASETS[name].load(num_rows, seed)
    elif spec.lower().endswith(TABLES) and key is None:
        rows = _from_table(spec, columns, context)
    elif spec.lower().endswith(".npz") and columns is None and context is None:
        rows = _from_npz(spec, key)
    elif spec.lower().endswith((*TABLES, ".npz")):
        raise ValueError(
            f"{spec}: expected columns and context with a .csv or .parquet, and key with an .npz"
        )
    else:
        raise ValueError(
            f"no data {spec!r}: expected one of {', '.join(DATASETS)}, or a file that ends in .csv, .parquet or .npz"
        )
    if len(rows.values) < min_rows:
        raise ValueError(
            f"{spec}: expected at least {min_rows} rows to train, stop and test, got {len(rows.values)}"
        )
    return rows


def split_rows(rows: Rows, seed: int) -> Split:
    """A tenth to stop by and a tenth to test with, drawn with this seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows.values), generator=generator)
    size = round(SHARE * len(order))
    return Split(
        *(
            Part(rows.values[chosen], None if rows.context is None else rows.context[chosen])
            for chosen in (order[2 * size :], order[:size], order[size : 2 * size])
        )
    )


# --- files ---


def _from_table(path: str, columns: Sequence[str] | None, context: Sequence[str] | None) -> Rows:
    arrays = load_data(path)
    if all(map(_is_number, arrays)):
        raise ValueError(
            f"data {path!r}: expected the names of the columns in the first row, got numbers"
        )
    given = list(context or ())
    names = [name for name in arrays if name not in given] if columns is None else list(columns)
    if both := [name for name in names if name in given]:
        raise ValueError(f"data {path!r}: {', '.join(both)}: expected columns or context, not both")
    missing = [name for name in (*names, *given) if name not in arrays]
    if missing:
        raise ValueError(
            f"data {path!r}: no column {', '.join(map(repr, missing))}: expected some of {', '.join(arrays)}"
        )
    if not names:
        raise ValueError(f"data {path!r}: expected a column beside the context, got none")
    strings = [name for name in (*names, *given) if name in arrays.levels]
    if strings:
        numbers = ",".join(name for name in names if name not in strings) or "..."
        raise ValueError(
            f"data {path!r}: expected columns of numbers, got strings in {', '.join(strings)}: take the columns {numbers}"
        )
    _check_finite(path, {name: arrays[name] for name in (*names, *given)})

    def stacked(chosen: Sequence[str]) -> Tensor:
        return torch.stack([arrays[name].to(torch.get_default_dtype()) for name in chosen], -1)

    at = stacked(given) if given else None
    return Rows(
        Path(path).stem, stacked(names), tuple(names), context=at, context_columns=tuple(given)
    )


def _from_npz(path: str, key: str | None) -> Rows:
    arrays = load_data(path)
    if key is None and len(arrays) != 1:
        raise ValueError(f"data {path!r}: expected a key, one of {', '.join(arrays)}")
    key = next(iter(arrays)) if key is None else key
    if key not in arrays:
        raise ValueError(f"data {path!r}: no {key!r}: expected a key, one of {', '.join(arrays)}")
    values = arrays[key].to(torch.get_default_dtype())
    _check_finite(path, {key: values})
    if values.dim() not in (1, 2, 3, 4):
        raise ValueError(
            f"data {path!r}, {key}: expected rows (N, D) or images (N, H, W) or (N, C, H, W), got {tuple(values.shape)}"
        )
    image_shape = None
    if values.dim() > 2:
        channels, (height, width) = values.shape[1:-2].numel(), values.shape[-2:]
        image_shape = (channels, height, width)
    values = values.reshape(len(values), -1)
    return Rows(Path(path).stem, values, _numbered(key, values), image_shape)


def _check_finite(path: str, columns: Mapping[str, Tensor]) -> None:
    for name, values in columns.items():
        problem = describe_nonfinite(name, values)
        if problem is not None:
            raise ValueError(f"data {path!r}, {problem}: leave such rows out")


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _numbered(name: str, values: Tensor) -> tuple[str, ...]:
    return tuple(f"{name}[{i}]" for i in range(values.shape[-1]))


# --- sets by name ---


def _toy(name: str, num_rows: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    values = TOYS[name].sample(num_rows, generator=generator)
    return Rows(name, values, ("x[0]", "x[1]"), entropy=TOYS[name].entropy)


def _packaged(name: str, num_rows: int, seed: int) -> Rows:
    found = getattr(scikit_learn_datasets(), f"load_{name.replace('-', '_')}")()
    values = torch.as_tensor(found.data, dtype=torch.get_default_dtype())
    columns = tuple(str(column) for column in found.feature_names)
    return Rows(name, values, columns)


def _digits(num_rows: int, seed: int) -> Rows:
    return replace(_packaged("digits", num_rows, seed), image_shape=(1, 8, 8), num_levels=17)


def _swiss_roll(num_rows: int, seed: int) -> Rows:
    points: Any = scikit_learn_datasets().make_swiss_roll(num_rows, noise=0.5, random_state=seed)[0]
    values = torch.as_tensor(points, dtype=torch.get_default_dtype())
    return Rows("swiss-roll", values, ("x[0]", "x[1]", "x[2]"))


DATASETS = {
    **{
        name: NamedRows(partial(_toy, name), f"{toy.description}, on the plane")
        for name, toy in TOYS.items()
    },
    "swiss-roll": NamedRows(_swiss_roll, "a rolled plane in 3 dimensions (scikit-learn)"),
    "iris": NamedRows(partial(_packaged, "iris"), "150 rows of 4 columns (scikit-learn)"),
    "wine": NamedRows(partial(_packaged, "wine"), "178 rows of 13 columns (scikit-learn)"),
    "diabetes": NamedRows(partial(_packaged, "diabetes"), "442 rows of 10 columns (scikit-learn)"),
    "breast-cancer": NamedRows(
        partial(_packaged, "breast-cancer"), "569 rows of 30 columns (scikit-learn)"
    ),
    "digits": NamedRows(
        _digits, "1,797 images of 8 x 8 whole numbers, dequantized by default (scikit-learn)"
    ),
}
