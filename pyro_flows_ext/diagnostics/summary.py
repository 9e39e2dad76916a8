"""Draws as a table: one row for every scalar parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


def _to_numpy(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)
