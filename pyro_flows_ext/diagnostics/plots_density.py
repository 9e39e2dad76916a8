"""Plots of a density: its draws beside the data, the density itself on the plane, and the loss of its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..distributions import Density
from . import plots
from .plots_style import DRAWS_COLOR, FONT_SIZE, REFERENCE_COLOR, TEXT_COLOR
from .scores import score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_DRAWS = 2000
# The density on the plane is scored on GRID points a side; a bound, with GRID_PARTICLES draws.
GRID, GRID_PARTICLES = 120, 10
NUM_IMAGES = 40


def samples(
    density: Density,
    data: Tensor,
    columns: Sequence[str],
    *,
    context: Tensor | None = None,
    image_shape: tuple[int, int, int] | None = None,
    verdict: str | None = None,
    trusted: bool = True,
) -> Figure:
    """Draws of a density beside data: images, points on the plane and the density, or pairs of columns.

    With a context, one draw at the context of each row.

    Args:
        density: of rows `(D)`, or of images.
        data: rows `(N, D)`; the first 2000 are drawn.
        columns: a name for each column.
        context: `(N, C)`, for a density with `context_dim`.
        image_shape: `(C, H, W)` of a row that is an image.
        verdict: a line for the top of the picture, see `plots.write_verdict`.
        trusted: whether the verdict is a good one.
    """
    data = data[:NUM_DRAWS].cpu()
    with torch.no_grad():
        if context is None:
            draws = density.sample((NUM_DRAWS,))
        else:
            at: Any = density
            draws = at.condition(context[:NUM_DRAWS]).sample()
        draws = draws.flatten(1).cpu()
    if image_shape is not None:
        figure = _images(image_shape, data, draws)
    elif data.shape[1] == 2 and context is None:
        figure = _plane(columns, data, draws, density)
    else:
        of_draws, of_data = (
            dict(zip(columns, values.T.numpy(), strict=True)) for values in (draws, data)
        )
        axes = plots.posterior(of_draws, reference=of_data, labels=("draws", "data"))
        title = axes[0, -1].get_legend().get_title()
        title.set_text(title.get_text().replace("parameters", "columns"))
        figure = axes.flat[0].figure
    if verdict is not None:
        plots.write_verdict(figure, verdict, trusted)
    return figure


def loss(result: Any) -> Figure:
    """The loss of every step and on the validation data, with the parameters that were kept.

    Args:
        result: the `DensityFitResult` of a run with validation data.
    """
    ax = plots.loss(result.losses)
    steps, losses = result.validation_steps.numpy(), result.validation_losses.numpy()
    ax.plot(steps, losses, color=REFERENCE_COLOR, lw=1.5, label="validation")
    best = f"kept: step {result.best_step}"
    ax.plot(result.best_step, result.best_loss, "o", color=REFERENCE_COLOR, ms=5, label=best)
    low, high = ax.get_ylim()
    seen = losses[(steps >= 0.1 * result.steps) & np.isfinite(losses)]
    seen = np.append(seen, result.best_loss)
    margin = 0.05 * (high - low)
    ax.set_ylim(min(low, seen.min() - margin), max(high, np.quantile(seen, 0.95) + margin))
    ax.set_xlim(0, max(result.steps, 2))
    ax.set_ylabel("loss (nats a row)")
    ax.legend(loc="upper right", fontsize=FONT_SIZE, labelcolor=TEXT_COLOR)
    return ax.figure  # type: ignore[return-value]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _plane(columns: Sequence[str], data: Tensor, draws: Tensor, density: Density) -> Any:
    """The data, as many draws, and the density on the same square."""
    num = min(len(data), len(draws))
    data, draws = data[:num], draws[:num]
    low, high = data.amin(0), data.amax(0)
    margin = 0.1 * (high - low)
    low, high = low - margin, high + margin
    figure = _figure(9.6, 3.5)
    left, middle, right = figure.subplots(1, 3)
    for ax, points, title in (
        (left, data, f"data, {num} rows"),
        (middle, draws, f"{num} draws"),
    ):
        ax.plot(*points.T.numpy(), ".", ms=2.5, alpha=0.5, mew=0, color=DRAWS_COLOR)
        ax.set_title(title, fontsize=FONT_SIZE + 1, color=TEXT_COLOR)
    x, y = (torch.linspace(a, b, GRID) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    log_p = score(density, torch.cartesian_prod(x, y), GRID_PARTICLES).values.reshape(GRID, GRID)
    mesh = right.pcolormesh(
        x.numpy(), y.numpy(), log_p.exp().T.numpy(), cmap="magma", shading="auto", rasterized=True
    )
    right.set_title("density", fontsize=FONT_SIZE + 1, color=TEXT_COLOR)
    bar = figure.colorbar(mesh, ax=right)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1, colors=TEXT_COLOR)
    for ax in (left, middle, right):
        ax.set_xlim(low[0].item(), high[0].item())
        ax.set_ylim(low[1].item(), high[1].item())
        ax.set_xlabel(columns[0], fontsize=FONT_SIZE, color=TEXT_COLOR)
        ax.tick_params(labelsize=FONT_SIZE - 1, colors=TEXT_COLOR)
    left.set_ylabel(columns[1], fontsize=FONT_SIZE, color=TEXT_COLOR)
    return figure


def _images(shape: tuple[int, int, int], data: Tensor, draws: Tensor) -> Any:
    """A sheet of images of the data beside a sheet of draws, on the scale of the data."""
    low, high = np.quantile(data.numpy(), [0.001, 0.999])
    figure = _figure(7.2, 4.2)
    for ax, images, title in zip(
        figure.subplots(1, 2), (data, draws), ("data", "draws"), strict=True
    ):
        sheet = _sheet(
            images[:NUM_IMAGES].reshape(-1, *shape), fill=float(low + 0.3 * (high - low))
        )
        sheet = ((sheet - low) / (high - low)).clip(0, 1)
        if shape[0] == 1:
            ax.imshow(sheet[..., 0], cmap="gray_r", vmin=0, vmax=1)
        else:
            ax.imshow(sheet[..., :3] if shape[0] >= 3 else sheet[..., 0])
        ax.set_title(title, fontsize=FONT_SIZE + 1, color=TEXT_COLOR)
        ax.set_axis_off()
    return figure


def _sheet(images: Tensor, fill: float, columns: int = 5) -> np.ndarray:
    """Images `(N, C, H, W)` side by side with a pixel between, `(rows, columns, C)`."""
    num, channels, height, width = images.shape
    num_rows = -(-num // columns)
    sheet = images.new_full(
        (num_rows * (height + 1) - 1, columns * (width + 1) - 1, channels), fill
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image.movedim(0, -1)
    return sheet.numpy()
