"""Colours, sizes, figures and axes that all plots share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion differ for colour-blind readers and in grey (Okabe & Ito 2008, Color universal design).
DRAWS_COLOR, REFERENCE_COLOR, TEXT_COLOR = "#0072B2", "#D55E00", "#333333"
# A warning is darker than the reference, which may be in the same picture.
WARNING_COLOR = "#B00020"
FONT_SIZE = 8.0
# Width and height of a panel, inches.
PANEL_SIZE = 1.75
MAX_LABEL = 22


def select(flat: dict[str, np.ndarray], names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """The numbers of the named sites or elements, in the order of `names`; raises `ValueError` for an unknown one."""
    if names is None:
        return flat
    chosen: dict[str, np.ndarray] = {}
    for name in names:
        found = {k: v for k, v in flat.items() if k == name or k.startswith(f"{name}[")}
        if not found:
            raise ValueError(f"names: expected some of {list(flat)}, got {name!r}")
        chosen.update(found)
    return chosen


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose layout leaves room for its texts."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def style_axes(ax: Axes, x_label: str | None, y_label: str | None, *, num_ticks: int) -> None:
    """Sets labels, ticks and spines; labels of ticks and powers of ten do not overlap."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_color("#888888")
    ax.tick_params(labelsize=FONT_SIZE - 1, colors=TEXT_COLOR, length=2.5, width=0.6)
    for axis, has_ticks in ((ax.xaxis, True), (ax.yaxis, len(ax.get_yticks()) > 0)):
        if not has_ticks:  # a marginal has no vertical scale
            continue
        formatter = ScalarFormatter(useMathText=True)
        formatter.set_powerlimits((-2, 4))  # labels of at most six characters, so that none overlap
        axis.set_major_formatter(formatter)
        axis.set_major_locator(MaxNLocator(num_ticks, steps=[1, 2, 5, 10], min_n_ticks=2))
        axis.offsetText.set_fontsize(FONT_SIZE - 1)
    style: dict[str, Any] = {"fontsize": FONT_SIZE, "color": TEXT_COLOR}
    if x_label is not None:
        x_formatter = ax.xaxis.get_major_formatter()
        x_formatter.format_ticks(ax.get_xticks().tolist())
        # The power of ten stands at the right end, on the label's line: move a label out of its way.
        ax.set_xlabel(shorten(x_label), labelpad=15 if x_formatter.get_offset() else 3, **style)
    if y_label is not None:
        ax.set_ylabel(shorten(y_label), **style)


def tint(color: str, strength: float) -> tuple[float, float, float]:
    """`color` mixed with white."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - strength * (1 - c) for c in to_rgb(color))
    return red, green, blue


def shorten(label: str) -> str:
    """The label, with an ellipsis in its middle if it is longer than `MAX_LABEL`."""
    if len(label) <= MAX_LABEL:
        return label
    keep = MAX_LABEL // 2
    return f"{label[: keep - 1]}…{label[-keep:]}"
