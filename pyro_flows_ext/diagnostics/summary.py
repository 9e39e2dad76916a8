"""Draws as a table: one row for every scalar parameter, for a file or a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class ParameterSummary:
    """Mean, standard deviation and quantiles of one scalar parameter; fields in the order of a table's columns."""

    parameter: str
    mean: float
    sd: float
    q05: float
    q50: float
    q95: float


def summary(samples: Mapping[str, Any]) -> list[ParameterSummary]:
    """A row for each scalar parameter of draws `{site: (N, *shape)}`, in the order of `flatten_samples`.

    The sd is that of a sample (divisor N - 1), NaN for one draw. O(N log N) a parameter.
    """
    rows = []
    for name, draws in flatten_samples(samples).items():
        sd = float(draws.std(ddof=1)) if len(draws) > 1 else float("nan")
        q05, q50, q95 = (float(q) for q in np.quantile(draws, [0.05, 0.5, 0.95]))
        rows.append(ParameterSummary(name, float(draws.mean()), sd, q05, q50, q95))
    return rows


def flatten_samples(samples: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Draws by scalar parameter: `{"x": (N, 2, 2)}` -> `{"x[0,0]": (N,), "x[0,1]": (N,), ...}`, float64.

    Values are tensors or arrays, draws along the first dimension; a site of shape `(N,)` keeps its name. Raises
    `ValueError` for a value without a dimension of draws, for no draws, and where sites differ in N.
    """
    flat: dict[str, np.ndarray] = {}
    sizes = {}
    for name, value in samples.items():
        array = _to_numpy(value)
        if array.ndim == 0 or len(array) == 0:
            raise ValueError(
                f"samples[{name!r}]: expected draws along the first dimension, got shape {array.shape}"
            )
        sizes[name] = len(array)
        columns = array.reshape(len(array), -1)
        for i, index in enumerate(product(*map(range, array.shape[1:]))):
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            flat[label] = columns[:, i]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"samples: expected as many draws of every site, got {sizes}")
    return flat


def to_csv(rows: Sequence[ParameterSummary]) -> str:
    """The rows of `summary` as text: `parameter,mean,sd,q05,q50,q95`, eight digits."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(field.name for field in fields(ParameterSummary))
    for row in rows:
        name, *values = astuple(row)
        writer.writerow([name, *(f"{value:.8g}" for value in values)])
    return file.getvalue()


def print_table(
    title: str, first: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Prints a table whose first column is text, and the others numbers, which are never cut short."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # as text: `theta[a]` is no markup
    console = Console(highlight=False)
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if width > console.width:
        console = Console(highlight=False, width=width)
    console.print(table, crop=False)


def rounded(value: float, sd: float) -> str:
    """A value to three digits of a standard deviation."""
    if not (math.isfinite(sd) and 1e-4 < abs(sd) < 1e6):
        return f"{value:.4g}"
    return f"{value:.{max(2 - math.floor(math.log10(sd)), 0)}f}"


def mean_and_sd(mean: float, sd: float) -> str:
    """`mean ± sd`, to three digits of the latter."""
    return f"{rounded(mean, sd)} ± {rounded(sd, sd)}"


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)
