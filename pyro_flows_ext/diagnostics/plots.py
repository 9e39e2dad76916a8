"""Plots that return matplotlib axes: a posterior beside its reference, and the loss of a fit.

No function here changes pyplot, rcParams or the backend. A notebook shows by itself a figure that it made,
`posterior(draws, figure=plt.figure())`; otherwise the figure is `axes.flat[0].figure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .plots_style import (
    DRAWS_COLOR,
    FONT_SIZE,
    PANEL_SIZE,
    REFERENCE_COLOR,
    TEXT_COLOR,
    WARNING_COLOR,
    new_figure,
    select,
    style_axes,
    tint,
)
from .summary import flatten_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# More points than this in a panel overlap; contours then represent the rest.
MAX_POINTS = 1000
# Contours hold these shares of the draws.
LEVELS = (0.9, 0.5)


def posterior(
    samples: Mapping[str, Any],
    *,
    reference: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    max_panels: int = 6,
    labels: tuple[str, str] = ("guide", "reference"),
    figure: Figure | SubFigure | None = None,
) -> np.ndarray:
    """Marginals on the diagonal, pairs below it.

    Contours of a pair hold 50 % and 90 % of the draws. Axes cover the central 99 % of the draws, with a margin.

    Args:
        samples: site -> draws `(N, *shape)`.
        reference: likewise, e.g. draws of a long MCMC run; outlined over the samples of the same name.
        names: selects and orders parameters, by site ("theta") or scalar ("theta[0]").
        max_panels: number of parameters to draw at most; the figure has a note if there are more.
        labels: of samples and reference.
        figure: to draw in; a new one by default.

    Returns:
        An array of axes `(P, P)`, hidden above the diagonal.

    Raises:
        ValueError: for unknown names, and for a parameter without finite draws.
    """
    draws = select(flatten_samples(samples), names)
    others = flatten_samples(reference) if reference is not None else {}
    parameters = list(draws)[:max_panels]
    if not parameters:
        raise ValueError("samples: expected at least one parameter to plot, got none")
    size = len(parameters)
    if figure is None:
        figure = new_figure(*(2 * [PANEL_SIZE * size] if size > 1 else [4.2, 2.8]))
    axes = figure.subplots(size, size, squeeze=False, sharex="col")
    ticks = 4 if size > 1 else 7
    limits = {p: _limits(p, draws[p], others.get(p)) for p in parameters}
    for row, y in enumerate(parameters):
        for column, x in enumerate(parameters):
            ax = axes[row, column]
            if column > row:
                ax.set_axis_off()
                continue
            if row == column:
                _marginal(ax, draws[x], others.get(x), limits[x])
            else:
                has_both = x in others and y in others
                _pair(ax, (draws[x], draws[y]), limits[x], limits[y], DRAWS_COLOR, fill=True)
                if has_both:
                    pair = (others[x], others[y])
                    _pair(ax, pair, limits[x], limits[y], REFERENCE_COLOR, fill=False)
                ax.set_ylim(*limits[y])
            ax.set_xlim(*limits[x])
            is_bottom, is_left = row == size - 1, column == 0 and row > 0
            style_axes(ax, x if is_bottom else None, y if is_left else None, num_ticks=ticks)
            ax.tick_params(labelbottom=is_bottom, labelleft=is_left)
            # The power of ten goes where the labels of the ticks go.
            ax.xaxis.offsetText.set_visible(is_bottom)
            ax.yaxis.offsetText.set_visible(is_left)
    has_reference = any(p in others for p in parameters)
    _legend(axes, labels if has_reference else (), hidden=len(draws) - size)
    return axes


def loss(result_or_losses: Any, *, ax: Axes | None = None) -> Axes:
    """The loss of every step in nats, and its running median over a twentieth of the steps.

    The vertical axis covers the losses after the first tenth of the steps; the legend gives the first loss if that is
    outside. Steps that are not finite are left out.

    Args:
        result_or_losses: a `FitResult`, or losses `(num_steps)`.
        ax: axes to draw in; new ones by default.

    Returns:
        The axes.

    Raises:
        ValueError: without a finite loss.
    """
    values = getattr(result_or_losses, "losses", result_or_losses)
    flat = flatten_samples({"losses": values})
    if list(flat) != ["losses"]:
        raise ValueError(f"losses: expected one number a step, got shape {np.shape(values)}")
    losses = flat["losses"]
    steps = np.arange(1, len(losses) + 1)
    is_finite = np.isfinite(losses)
    if not is_finite.any():
        raise ValueError(f"losses: expected at least one finite value of {len(losses)}, got none")
    if ax is None:
        ax = new_figure(5.6, 3.2).add_subplot()
    centres, medians = _running_median(steps[is_finite], losses[is_finite])
    later = losses[is_finite & (steps > len(losses) // 10)]
    low, high = np.quantile(later if len(later) else losses[is_finite], [0.005, 0.995])
    low, high = min(low, medians.min()), max(high, medians[len(medians) // 10 :].max())
    margin = 0.08 * (high - low) or 0.5
    first = losses[is_finite][0]
    label = "every step" if first <= high + margin else f"every step (the first: {first:,.5g})"
    ax.plot(steps[is_finite], losses[is_finite], color=DRAWS_COLOR, alpha=0.3, lw=0.6, label=label)
    ax.plot(centres, medians, color=DRAWS_COLOR, lw=1.8, label="running median")
    ax.set_xlim(1, max(len(losses), 2))
    ax.set_ylim(low - margin, high + margin)
    style_axes(ax, "step", "loss (nats)", num_ticks=7)
    legend = ax.legend(loc="upper right", fontsize=FONT_SIZE, labelcolor=TEXT_COLOR)
    legend.get_frame().set(facecolor="white", alpha=0.85, linewidth=0)
    return ax


def write_verdict(figure: Figure | SubFigure, verdict: str, trusted: bool) -> None:
    """Writes a line above everything in a figure: whether its draws can be trusted.

    Args:
        figure: e.g. `axes.flat[0].figure`.
        verdict: the text, wrapped to the width of the figure.
        trusted: False writes it in red and bold.
    """
    from textwrap import fill

    # The mean width of a character of the font is half of its height.
    width = figure.bbox.width / figure.dpi * 72 / (0.55 * FONT_SIZE)
    figure.suptitle(
        fill(verdict, max(20, int(width))),
        fontsize=FONT_SIZE,
        fontweight="normal" if trusted else "bold",
        color=TEXT_COLOR if trusted else WARNING_COLOR,
        x=0.01,
        ha="left",
    )


# --- panels ---


def _marginal(
    ax: Axes, draws: np.ndarray, reference: np.ndarray | None, limits: tuple[float, float]
) -> None:
    draws = draws[np.isfinite(draws)]
    reference = None if reference is None else reference[np.isfinite(reference)]
    bins = _bins(
        draws, limits, len(draws) if reference is None else min(len(draws), len(reference))
    )
    ax.hist(draws, bins, density=True, color=DRAWS_COLOR, alpha=0.35, lw=0)
    ax.hist(draws, bins, density=True, color=DRAWS_COLOR, histtype="step", lw=1.0)
    if reference is not None:
        ax.hist(reference, bins, density=True, color=REFERENCE_COLOR, histtype="step", lw=1.5)
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)


def _bins(draws: np.ndarray, limits: tuple[float, float], num_draws: int) -> list[float]:
    """Edges of bins: wider with fewer draws, against noise; centred on the integers for counts."""
    low, high = limits
    num_bins = int(np.clip(2.2 * num_draws ** (1 / 3), 10, 50))
    if np.array_equal(draws, draws.round()):
        step = math.ceil((high - low) / 50)
        return (np.arange(math.floor(low), math.ceil(high) + step + 1, step) - 0.5).tolist()
    return np.linspace(low, high, num_bins + 1).tolist()


def _pair(
    ax: Axes,
    pair: tuple[np.ndarray, np.ndarray],
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
    color: str,
    *,
    fill: bool,
) -> None:
    is_finite = np.isfinite(pair[0]) & np.isfinite(pair[1])
    x, y = pair[0][is_finite], pair[1][is_finite]
    if fill:
        thin = slice(None, None, max(1, math.ceil(len(x) / MAX_POINTS)))
        ax.plot(x[thin], y[thin], ".", color=color, ms=2.0, alpha=0.35, mew=0, rasterized=True)
    x_range, y_range = _extent(x, x_limits), _extent(y, y_limits)
    if not (x_range[0] < x_range[1] and y_range[0] < y_range[1]):  # a constant has no contours
        return
    grid = _density(x, y, x_range, y_range)
    levels = _mass_levels(grid[-1])
    if len(levels) < 2:  # too few draws
        return
    if fill:
        edges = [*levels, 1.01 * grid[-1].max()]
        ax.contourf(*grid, edges, colors=[tint(color, 0.5), tint(color, 0.8)], alpha=0.6)
    ax.contour(*grid, levels, colors=color, linewidths=0.8 if fill else 1.3)


def _extent(values: np.ndarray, limits: tuple[float, float]) -> tuple[float, float]:
    """The range of values within the limits: a smoothed density must not cross the bounds of a support."""
    if not len(values):
        return 0.0, 0.0
    return max(limits[0], float(values.min())), min(limits[1], float(values.max()))


def _density(
    x: np.ndarray, y: np.ndarray, x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres of cells in x and y, and a smoothed histogram with y along the rows, a border of zeros around it."""
    bins = 60
    counts, _, _ = np.histogram2d(y, x, bins=bins, range=[y_range, x_range])
    # Scott's width is for a normal; four fifths of it keep a bend from filling up.
    factor = 0.8 * len(x) ** (-1 / 6)
    centres = []
    for axis, (value, (low, high)) in enumerate(((y, y_range), (x, x_range))):
        cell = (high - low) / bins
        inside = value[(value >= low) & (value <= high)]
        width = max(factor * float(inside.std()) / cell, 0.5) if len(inside) else 0.5
        offset = np.arange(bins)[:, None] - np.arange(bins)
        kernel = np.exp(-0.5 * (offset / width) ** 2)
        kernel /= kernel.sum(
            0
        )  # what leaves at one end of the range comes back in: no mass is lost at a bound
        counts = np.moveaxis(np.tensordot(kernel, counts, (1, axis)), 0, axis)
        middle = low + cell * (np.arange(bins) + 0.5)
        centres.append(np.concatenate([[low], middle, [high]]))
    return centres[1], centres[0], np.pad(counts, 1)


def _mass_levels(density: np.ndarray) -> list[float]:
    """The densities above which lie the shares `LEVELS` of the mass; increasing, and none twice."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = ordered.cumsum()
    if not mass[-1] > 0:
        return []
    return sorted({float(ordered[np.searchsorted(mass, share * mass[-1])]) for share in LEVELS})


def _running_median(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At up to 400 places, over a twentieth of the steps around them: O(20 N).

    The window shrinks towards the first step, where the loss falls steeply, but not towards the last.
    """
    half = max(2, len(losses) // 40)
    centres = np.unique(np.linspace(0, len(losses) - 1, 400).astype(int))
    reach = np.minimum(half, np.maximum(centres, 1))
    medians = [
        np.median(losses[max(0, c - r) : c + r + 1])
        for c, r in zip(centres.tolist(), reach.tolist(), strict=True)
    ]
    return steps[centres], np.array(medians)


def _limits(name: str, draws: np.ndarray, reference: np.ndarray | None) -> tuple[float, float]:
    """The central 99 % of either set of draws, and a margin; never past the draws by more than the margin."""
    ends = []
    for values in (draws, reference):
        if values is not None and np.isfinite(values).any():
            ends.append(np.quantile(values[np.isfinite(values)], [0.005, 0.995]))
        elif values is draws:
            raise ValueError(f"samples: expected finite draws of {name!r}, got none")
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    margin = 0.06 * (high - low)
    if not margin > 1e-9 * max(abs(low), abs(high)):  # a constant
        margin = 0.5 * max(abs(low), 1.0)
    return float(low - margin), float(high + margin)


def _legend(axes: np.ndarray, labels: Sequence[str], *, hidden: int) -> None:
    """In the empty corner above the diagonal; above a single panel."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if labels:
        face = tint(DRAWS_COLOR, 0.4)
        handles = [
            Patch(facecolor=face, edgecolor=DRAWS_COLOR, label=labels[0]),
            Line2D([], [], color=REFERENCE_COLOR, lw=1.5, label=labels[1]),
        ]
    title = f"{len(axes)} of {len(axes) + hidden} parameters" if hidden else None
    if not handles and title is None:
        return
    place: dict[str, Any] = {"loc": "upper right"}
    if len(axes) == 1:
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
    legend = axes[0, -1].legend(
        handles=handles,
        title=title,
        frameon=False,
        fontsize=FONT_SIZE,
        labelcolor=TEXT_COLOR,
        **place,
    )
    legend.get_title().set(fontsize=FONT_SIZE, color=TEXT_COLOR)
