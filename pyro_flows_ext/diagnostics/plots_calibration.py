"""The picture of simulation-based calibration: rank histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .calibration import CalibrationResult
from .plots_style import (
    DRAWS_COLOR,
    FONT_SIZE,
    PANEL_SIZE,
    REFERENCE_COLOR,
    TEXT_COLOR,
    new_figure,
    select,
    style_axes,
    tint,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

# Share of the bins of uniform ranks that fall inside the band.
BAND = 0.99
COLUMNS = 3


def rank_histogram(
    result: CalibrationResult,
    *,
    names: Sequence[str] | None = None,
    max_panels: int = 9,
    figure: Figure | SubFigure | None = None,
) -> np.ndarray:
    """Histograms of ranks by parameter.

    The band holds 99 % of the counts that uniform ranks would give a bin (binomial); its line is their mean. Bars that
    rise at both ends mean draws too close together, a hill in the middle draws too far apart, a slope draws to one
    side.

    Args:
        result: of `simulation_based_calibration`.
        names: selects and orders, by site or scalar parameter.
        max_panels: number of parameters at most, those of the lowest p-values; the figure has a note if there are more.
        figure: to draw in; a new one by default.

    Returns:
        An array of axes `(rows, columns)`; unused ones are hidden.

    Raises:
        ValueError: for unknown names.
    """
    chosen = list(select(dict(result.ranks), names))
    p_values = result.p_values
    shown = chosen
    if len(chosen) > max_panels:
        worst = set(sorted(chosen, key=p_values.__getitem__)[:max_panels])
        shown = [name for name in chosen if name in worst]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    if figure is None:
        figure = new_figure(1.3 * PANEL_SIZE * columns + 0.4, 1.05 * PANEL_SIZE * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for i, (ax, name) in enumerate(zip(axes.flat, shown, strict=False)):
        counts, expected = result.counts(name)
        edges = result.edges - 0.5
        low, high = _band(len(result.ranks[name]), np.diff(result.edges) / (result.num_draws + 1))
        ax.bar(
            edges[:-1],
            counts,
            np.diff(edges),
            align="edge",
            color=tint(DRAWS_COLOR, 0.5),
            edgecolor=DRAWS_COLOR,
            lw=0.6,
        )
        band = {"step": "post", "color": REFERENCE_COLOR}
        ax.fill_between(
            edges, *(np.append(v, v[-1]) for v in (low, high)), alpha=0.25, lw=0, **band
        )
        ax.stairs(expected, edges, color=REFERENCE_COLOR, lw=1.2, baseline=None)
        ax.set_xlim(edges[0], edges[-1])
        ax.set_ylim(0, 1.15 * max(counts.max(), high.max()))
        title = f"{name}   p = {p_values[name]:.2g}"
        ax.set_title(title, fontsize=FONT_SIZE, color=TEXT_COLOR, pad=3)
        is_bottom = i + columns >= len(shown)
        x_label = f"rank of {result.num_draws}" if is_bottom else None
        style_axes(ax, x_label, "count" if i % columns == 0 else None, num_ticks=4)
        ax.tick_params(labelbottom=is_bottom)
    if len(shown) < len(chosen):
        title = f"the {len(shown)} of {len(chosen)} parameters with the lowest p-values"
        figure.suptitle(title, fontsize=FONT_SIZE, color=TEXT_COLOR)
    return axes


def _band(num_ranks: int, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The central `BAND` of Binomial(num_ranks, share), for each share."""
    from scipy.stats import binom

    tail = (1 - BAND) / 2
    return binom.ppf(tail, num_ranks, shares), binom.ppf(1 - tail, num_ranks, shares)
