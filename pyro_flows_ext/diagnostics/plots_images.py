"""Plots of multi-scale flows over images: the level after which each element leaves, and its contributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributions import MultiScaleFlow
from ..transforms import Squeeze
from .plots_style import FONT_SIZE, PANEL_SIZE, TEXT_COLOR, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def exit_levels(flow: MultiScaleFlow) -> Tensor:
    """The level, from 1, after which each element of the first level's image becomes a latent: integers `(C, H, W)`."""
    levels = flow.multiscale
    count = torch.full(levels.event_shape, len(levels.levels))
    origin = torch.arange(count.numel()).reshape(count.shape)
    for i, mask in enumerate(levels.masks):
        count.view(-1)[origin[mask.cpu()]] = i + 1
        origin = origin.flatten()[levels.kept(i).cpu()]
    return count


def factoring(
    flow: MultiScaleFlow,
    contributions: Sequence[Tensor] | None = None,
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """The level after which each element leaves, and its contributions if given: a row for each channel.

    All panels have the shape of the first level's image. If the flow starts with a squeeze, they are drawn at the
    places of the pixels, which its 1x1 convolutions mix.

    Args:
        flow: a multi-scale flow.
        contributions: of `MultiScaleFlow.contributions`, of the unfactored flow, up to the end of each level, in nats.
        figure: to draw in; a new one by default.

    Returns:
        The figure.

    Raises:
        TypeError: for a flow of another kind.
        ValueError: for contributions of another number of levels or shape.
    """
    if not isinstance(flow, MultiScaleFlow):
        raise TypeError(f"flow: expected a MultiScaleFlow, got a {type(flow).__name__}")
    exits, shares = exit_levels(flow), list(contributions or [])
    num_levels = len(flow.multiscale.levels)
    if shares and [s.shape for s in shares] != num_levels * [exits.shape]:
        raise ValueError(
            f"contributions: expected {num_levels} tensors of shape {tuple(exits.shape)}, got shapes "
            f"{[tuple(s.shape) for s in shares]}"
        )
    pictures = [exits, *(s.detach().cpu() for s in shares)]
    if exits.shape != flow.event_shape:
        pictures = [Squeeze().inverse_and_ladj(p)[0] for p in pictures]
    rows, columns = pictures[0].shape[0], len(pictures)
    if figure is None:
        figure = new_figure(1.3 * PANEL_SIZE * columns + 0.3, 1.1 * PANEL_SIZE * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, picture in enumerate(pictures):
        if column == 0:
            last, title = _draw_exits(axes[:, 0], picture, num_levels), "leaves after level"
        else:
            last, title = _draw_shares(axes[:, column], picture), f"nats up to level {column}"
        axes[0, column].set_title(title, fontsize=FONT_SIZE, color=TEXT_COLOR, pad=4)
        bar = figure.colorbar(last, ax=list(axes[:, column]), location="bottom", pad=0.02)
        bar.outline.set_visible(False)
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=FONT_SIZE - 1, colors=TEXT_COLOR, length=2)
        if column == 0:
            bar.set_ticks(range(1, num_levels + 1))
    for row in range(rows if rows > 1 else 0):
        axes[row, 0].set_ylabel(f"channel {row + 1}", fontsize=FONT_SIZE, color=TEXT_COLOR)
    return figure


def _draw_exits(axes: Iterable[Axes], picture: Tensor, num_levels: int) -> Any:
    """Levels in steps of one colour, the darker the longer an element stays."""
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    shades = colormaps["Blues"](torch.linspace(0.1, 0.9, num_levels).tolist())
    norm = BoundaryNorm([0.5 + i for i in range(num_levels + 1)], num_levels)
    return _draw(axes, picture, cmap=ListedColormap(shades), norm=norm)


def _draw_shares(axes: Iterable[Axes], picture: Tensor) -> Any:
    low, high = picture.min().item(), picture.max().item()
    return _draw(axes, picture, cmap="viridis", vmin=low, vmax=high)


def _draw(axes: Iterable[Axes], picture: Tensor, **options: Any) -> Any:
    for ax, channel in zip(axes, picture, strict=True):
        image = ax.imshow(channel.numpy(), interpolation="nearest", **options)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    return image
