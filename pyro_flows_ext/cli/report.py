"""What a fit came to: the draws it leaves, tables for a terminal, files."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pyro.infer.autoguide import AutoGuide

from ..diagnostics import ImportanceResult, ParameterSummary, plots, summary
from ..infer import FitResult
from .targets import Target

# More rows scroll away; summary.csv has all of them.
MAX_ROWS = 50


@dataclass(frozen=True)
class Fitted:
    """A trained guide, how training went, its weighed draws, and its draws as ArviZ holds them."""

    target: Target
    guide: AutoGuide
    result: FitResult
    weights: ImportanceResult
    exported: Any

    @cached_property
    def rows(self) -> list[ParameterSummary]:
        """Mean, sd and quantiles of every scalar, deterministic ones too."""
        return summary(posterior_draws(self.exported))


def posterior_draws(exported: Any) -> dict[str, np.ndarray]:
    """Site -> `(N, *shape)` of the posterior group of `to_inference_data`, deterministic sites included."""
    group = exported["posterior"]
    return {str(name): group[name].values[0] for name in group.data_vars}


# --- files ---


def write_csv(fitted: Fitted, path: Path) -> None:
    """`parameter,mean,sd,q05,q50,q95`, a row for each scalar."""
    names = [field.name for field in fields(ParameterSummary)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in fitted.rows:
            values = (getattr(row, name) for name in names[1:])
            writer.writerow([row.parameter, *(f"{value:.8g}" for value in values)])


def write_npz(draws: Mapping[str, np.ndarray], path: Path) -> None:
    """Site -> `(N, *shape)`, for `numpy.load`."""
    np.savez(path, **draws)  # type: ignore[arg-type]


def write_figures(fitted: Fitted, posterior_path: Path, loss_path: Path) -> None:
    """The posterior as a picture, with the reweighted draws over it where their weights are reliable; and the loss."""
    reference = fitted.weights.resample() if fitted.weights.reliable else None
    axes = plots.posterior(
        posterior_draws(fitted.exported), reference=reference, labels=("guide", "reweighted")
    )
    axes.flat[0].figure.savefig(posterior_path)
    plots.loss(fitted.result).figure.savefig(loss_path)  # type: ignore[union-attr]


# --- the terminal ---


def print_fit(fitted: Fitted) -> None:
    """A table of the parameters, beside the reference where the target has one, and how good the guide is."""
    reference = fitted.target.reference or {}
    columns = ["mean", "sd", "5 %", "50 %", "95 %", *(["reference"] if reference else [])]
    rows = []
    for row in fitted.rows[:MAX_ROWS]:
        values = (row.mean, row.sd, row.q05, row.q50, row.q95)
        cells = [row.parameter, *(_number(value, row.sd) for value in values)]
        if reference:
            cells.append(
                _mean_and_sd(*reference[row.parameter]) if row.parameter in reference else ""
            )
        rows.append(cells)
    print_table(f"{fitted.target.name}, {type(fitted.guide).__name__}", "parameter", columns, rows)
    if len(fitted.rows) > MAX_ROWS:
        print(f"and {len(fitted.rows) - MAX_ROWS} more in summary.csv")
    result = fitted.result
    print(fitted.weights)
    print(f"{result.steps} steps in {result.seconds:.1f} s")
    if not result.converged:
        print("The bound was still rising at the end: take more steps.")
    if result.skipped_steps:
        print(f"{result.skipped_steps} steps without a finite loss and gradient were skipped.")


def print_comparison(target: Target, fits: Mapping[str, Fitted], parameters: Sequence[str]) -> None:
    """One row a guide, below the reference: the parameters (mean ± sd), k-hat, ESS, ELBO and time."""
    reference = target.reference or {}
    rows = [["reference", *(_mean_and_sd(*reference[p]) for p in parameters), *4 * [""]]]
    for name, fitted in fits.items():
        by_name = {row.parameter: row for row in fitted.rows}
        weights = fitted.weights
        rows.append(
            [
                name,
                *(_mean_and_sd(by_name[p].mean, by_name[p].sd) for p in parameters),
                f"{weights.k_hat:.2f}",
                f"{weights.efficiency:.0%}",
                f"{weights.elbo:.2f} ± {weights.elbo_se:.2f}",
                f"{fitted.result.seconds:.0f} s",
            ]
        )
    print_table(target.name, "guide", [*parameters, "k-hat", "ESS", "ELBO", "time"], rows)


def print_table(
    title: str, first: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table whose first column is text, and the others numbers."""
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
    # A number cut short is worse than a line that wraps.
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if width > console.width:
        console = Console(highlight=False, width=width)
    console.print(table, crop=False)


def _number(value: float, sd: float) -> str:
    """Three digits of the standard deviation, and as many decimals for what goes with it."""
    if not (math.isfinite(sd) and 1e-4 < abs(sd) < 1e6):
        return f"{value:.4g}"
    return f"{value:.{max(2 - math.floor(math.log10(sd)), 0)}f}"


def _mean_and_sd(mean: float, sd: float) -> str:
    return f"{_number(mean, sd)} ± {_number(sd, sd)}"
