"""What is checked of data before a density trains on them, and the units in which its layers see them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...distributions import Density, Dequantized, MultiScaleFlow, TransformedDensity
from ...programs import describe_nonfinite
from ...transforms import ActNorm
from .rows import HEAD_ROWS, Batch, Rows, Stream

CHUNK = 65_536
# Splines are the identity beyond a few units, and affine layers start near it: "auto" standardises columns whose scale or
# mean is off by more than this factor. Training copes with a factor of `FAR`, beyond which data left as they are are
# warned of.
OFF, FAR = 3.0, 100.0
# Scales of columns that differ by more than this are likewise far.
LARGEST_RATIO = 1e3
# Share of the variance of standardised columns below which a combination of them is constant to rounding.
NO_VARIANCE = 1e-10
# Columns above which the search for such combinations is left out: it takes D³ operations.
MANY_COLUMNS = 256
# Rows that ActNorms start from.
INITIAL_ROWS = 2000
# A column of fewer distinct values than one in this many rows repeats them: real numbers hardly ever do.
REPEATS = 10
# Rows below which repeated values are a matter of chance and rounding.
MIN_ROWS = 20
# Whole numbers whose standard deviation exceeds so many steps are as good as real ones.
MANY_LEVELS = 1000
# Spacing of a dtype's numbers, in standard deviations of a column, above which rounding shapes the density.
COARSE = 1e-2


@dataclass(frozen=True)
class Moments:
    """Means and standard deviations by element of a row, float64, of `count` rows."""

    count: int
    mean: Tensor
    sd: Tensor

    def dequantized(self, num_levels: int) -> Moments:
        """Of whole numbers 0 ... L - 1 with uniform noise, brought to [0, 1)."""
        sd = (self.sd.square() + 1 / 12).sqrt()
        return Moments(self.count, (self.mean + 0.5) / num_levels, sd / num_levels)

    def per_channel(self) -> Moments:
        """Over the pixels of images `(C, H, W)`: `(C, 1, 1)`."""
        mean = self.mean.mean((-2, -1), keepdim=True)
        within = self.sd.square() + (self.mean - mean).square()
        return Moments(self.count, mean, within.mean((-2, -1), keepdim=True).sqrt())


def moments_of(rows: Rows, part: str = "values") -> Moments:
    """The moments of all rows; of a stream, those of its first rows."""
    count = 0
    sums: Tensor | None = None
    for chunk in _chunks(rows):
        batch = getattr(chunk, part).to(torch.float64)
        if sums is None:
            first, sums = batch[0], torch.zeros(2, *batch.shape[1:]).to(batch)
        count += len(batch)
        # Sums of squares about a value among the data lose no digits to a large mean.
        shifted = batch - first
        sums = sums + torch.stack([shifted.sum(0), shifted.square().sum(0)])
    mean, square = (torch.as_tensor(sums) / count).unbind()
    return Moments(count, first + mean, (square - mean.square()).clamp(min=0).sqrt())


def check_rows(name: str, rows: Rows, dtype: torch.dtype) -> None:
    """Raises `ValueError` for NaN, infinite values and those beyond the dtype, in rows and contexts.

    Of a stream its first rows are read, and the others when they come.
    """
    start = 0
    for chunk in _chunks(rows):
        check_finite(name, chunk.values, dtype, rows.columns, start)
        if chunk.context is not None:
            what = "context" if name == "data" else f"{name} context"
            check_finite(what, chunk.context, dtype, rows.context_columns, start)
        start += len(chunk.values)


def _chunks(rows: Rows) -> Iterable[Batch]:
    return [rows.head(HEAD_ROWS)] if isinstance(rows, Stream) else rows.chunks(CHUNK)


def check_finite(
    name: str, batch: Tensor, dtype: torch.dtype, columns: list[str] | None = None, start: int = 0
) -> None:
    """`ValueError` with count, first row and column of what is NaN, infinite or beyond the dtype."""
    problem = describe_nonfinite(name, batch, start=start, columns=columns)
    if problem is not None:
        raise ValueError(f"{problem}; remove or impute them")
    problem = describe_nonfinite(name, batch.to(dtype), start=start, columns=columns)
    if problem is not None:
        raise ValueError(f"{problem} once they are {dtype}; rescale them, or call density.double()")


def warn_of_discrete(name: str, density: Density, rows: Rows, moments: Moments) -> None:
    """Warns of columns on which a density is unbounded: constant, repeated or whole numbers, linearly dependent ones."""
    if any(isinstance(part, Dequantized) for part in density.modules()):
        return
    values = rows.head(HEAD_ROWS).values
    if values.dim() != 2:
        return
    constant = moments.sd <= 1e-12 * moments.mean.abs()
    repeated = _repeats(values, moments.sd) & ~constant
    dependent = _dependent(values, moments) & ~constant & ~repeated
    parts = [
        _listed(mask, rows.columns, kind)
        for mask, kind in (
            (constant, "constant"),
            (repeated, "whole numbers or few distinct values"),
            (dependent, "linear combinations of one another"),
        )
        if bool(mask.any())
    ]
    if parts:
        numbers = values.double()
        is_whole = bool(((numbers >= 0) & (numbers == numbers.round())).all())
        levels = int(numbers.max()) + 1 if is_whole and not bool(constant.any()) else None
        way = (
            f"Dequantized(density, num_levels={levels})"
            if levels
            else "Dequantized, for whole numbers from 0"
        )
        warnings.warn(
            f"{name}: {', '.join(parts)}: the likelihood of a density of real numbers has no bound there; wrap the "
            f"density in {way}, leave the columns out, or add noise of the width of a step",
            stacklevel=4,
        )


def _repeats(values: Tensor, sd: Tensor) -> Tensor:
    """Which columns of `(N, D)` repeat their values, or are whole numbers."""
    whole = torch.ones(values.shape[1], dtype=torch.bool)
    if values.is_floating_point():
        # Beyond this all numbers of the dtype are whole.
        limit = 0.5 / torch.finfo(values.dtype).eps
        whole = ((values == values.round()) & (values.abs() < limit)).all(0).cpu()
    whole = whole & (sd.cpu() < MANY_LEVELS)
    if len(values) < MIN_ROWS:
        return whole.to(sd.device)
    distinct = torch.tensor([len(column.unique()) for column in values.T])
    return (whole | (distinct * REPEATS <= len(values))).to(sd.device)


def _dependent(values: Tensor, moments: Moments) -> Tensor:
    """Which columns of `(N, D)` enter a linear combination that does not vary."""
    num_columns = values.shape[1]
    none = torch.zeros(num_columns, dtype=torch.bool, device=moments.sd.device)
    if num_columns > MANY_COLUMNS or len(values) < max(MIN_ROWS, 2 * num_columns):
        return none
    z = (values.to(moments.mean) - moments.mean) / _positive(moments.sd)
    variances, directions = torch.linalg.eigh(z.mT @ z / len(z))
    scale = variances.max().clamp(min=1.0)
    fixed = directions[:, variances < NO_VARIANCE * scale]
    return (fixed.abs() > 1e-3).any(-1) if fixed.shape[1] else none


def _listed(mask: Tensor, columns: list[str] | None, kind: str) -> str:
    numbers = mask.nonzero().flatten().tolist()
    names = [repr(columns[i]) if columns else str(i) for i in numbers[:5]]
    more = ", ..." if len(numbers) > 5 else ""
    return f"column{'s' if len(numbers) > 1 else ''} {', '.join(names)}{more} of {kind}"


# --- units ---


def standardize(
    density: Density, rows: Rows, moments: Moments, how: bool | str, context: Moments | None
) -> None:
    """Sets the units of a density and of its context by the moments of the data.

    "auto": where the data are off unit scale, the density is of all real numbers, and its layers do better so.
    """
    like = next(density.parameters())
    if moments.mean.dim() == 3:
        moments = moments.per_channel()
    whole = density
    layers = density.flow if isinstance(density, Dequantized) else density
    if isinstance(density, Dequantized) and density.preprocess is None:
        # Its flow sees whole numbers with noise, brought to [0, 1).
        moments = moments.dequantized(int(density.num_levels))
        density = density.flow
    if how is False:
        _warn_of_scales(moments, "pass standardize=True")
        return
    if (
        context is not None
        and isinstance(layers, TransformedDensity)
        and layers.context_standardization is None
        and (how is True or is_off(context, OFF))
    ):
        layers.standardize_context(context.mean, _positive(context.sd))
    if density.standardization is not None or (how == "auto" and not is_off(moments, OFF)):
        _check_resolution(moments, like.dtype)
        return
    try:
        before = _score(whole, rows.head(512), like) if how == "auto" else -math.inf
        density.standardize(moments.mean, _positive(moments.sd))
    except (TypeError, ValueError) as error:
        if how is True:
            raise ValueError(f"standardize=True: {error}") from None
        if not any(isinstance(part, Dequantized) for part in density.modules()):
            _warn_of_scales(moments, "standardise the data")
        return
    # A density that was trained in the units of the data keeps them.
    if how == "auto" and before > _score(whole, rows.head(512), like):
        density.standardization = None
    _check_resolution(moments, like.dtype)


@torch.no_grad()
def initialize(density: Density, rows: Rows) -> None:
    """Starts the ActNorms of a new density of images from the data; those that were started stay as they are."""
    like = next(density.parameters())
    images = density.flow if isinstance(density, Dequantized) else density
    norms = [part for part in density.modules() if isinstance(part, ActNorm)]
    if not isinstance(images, MultiScaleFlow) or any(bool(part.initialized) for part in norms):
        return
    batch = rows.head(INITIAL_ROWS).to(like)
    values = batch.values
    if isinstance(density, Dequantized):
        values = (values + torch.rand_like(values)) / density.num_levels
        if density.preprocess is not None:
            values = density.preprocess.forward_and_ladj(values)[0]
    if batch.context is not None:
        images = images.condition(batch.context)
    images.initialize(values)


def is_off(moments: Moments, factor: float) -> bool:
    """Whether a column is off zero mean and unit scale by a factor, or the columns' scales are far from one another."""
    sd = _positive(moments.sd)
    far = (sd < 1 / factor) | (sd > factor) | (moments.mean.abs() > factor)
    return bool(far.any()) or bool(sd.max() > LARGEST_RATIO * sd.min())


@torch.no_grad()
def _score(density: Density, batch: Batch, like: Tensor) -> float:
    """The mean objective on a few rows; -inf where it is not finite."""
    density.eval()
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.manual_seed(0)
        total = objective(density, batch.to(like)).double().mean().item()
    return total if math.isfinite(total) else -math.inf


def objective(density: Density, batch: Batch) -> Tensor:
    """The objective by row, given the contexts: `(B)`."""
    at: Any = density if batch.context is None else density.condition(batch.context)
    return at.objective(batch.values)


def _positive(sd: Tensor) -> Tensor:
    """Standard deviations, and one where a column is constant."""
    return torch.where(sd > 0, sd, torch.ones_like(sd))


def _warn_of_scales(moments: Moments, advice: str) -> None:
    if is_off(moments, FAR):
        sd = _positive(moments.sd)
        warnings.warn(
            f"data: expected columns near zero mean and unit scale, got standard deviations from {sd.min():.2g} to "
            f"{sd.max():.2g} and means up to {moments.mean.abs().max():.2g}; {advice}",
            stacklevel=5,
        )


def _check_resolution(moments: Moments, dtype: torch.dtype) -> None:
    """Warns where the dtype rounds a column to few values within a standard deviation."""
    spacing = moments.mean.abs() * torch.finfo(dtype).eps / _positive(moments.sd)
    coarse = (spacing > COARSE) & (moments.sd > 0)
    if bool(coarse.any()):
        warnings.warn(
            f"data: {dtype} rounds to {spacing.max():.2g} standard deviations at a mean of "
            f"{moments.mean.flatten()[spacing.argmax()]:.6g}; subtract an offset from the data, or call density.double()",
            stacklevel=5,
        )
