"""Log-likelihoods of held-out rows, beside those of a Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributions import Density, Dequantized, FlowDistribution
from ..flows.recipe import normal
from ..transforms import ResidualFlow, Standardize, Whitening
from ..transforms.residual import EXACT_DIM

# Rows times draws of the bound at a time.
CHUNK = 20_000
# Shares of the diagonal in the covariance of the Gaussian; the validation rows select one.
SHRINKAGE = (0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
MIN_SCALE = 1e-3


@dataclass(frozen=True)
class Score:
    """log p by row in nats. `kind`: "exact", "bound", a lower one of `num_particles` draws, or "estimate", unbiased."""

    values: Tensor
    kind: str
    num_particles: int | None = None

    @property
    def mean(self) -> float:
        """Nats a row."""
        return self.values.mean().item()

    @property
    def se(self) -> float:
        """The standard error of the mean over rows."""
        return standard_error(self.values)

    @property
    def known(self) -> str:
        """How it is known, in words."""
        if self.kind == "bound":
            return (
                f"a lower bound, {self.num_particles} draw{'s' if self.num_particles != 1 else ''}"
            )
        return {"exact": "exactly", "estimate": "an unbiased estimate"}[self.kind]

    def __str__(self) -> str:
        return mean_and_se(self.mean, self.se)

    def as_dict(self) -> dict[str, Any]:
        """Mean, standard error and kind, for a file."""
        draws = {} if self.num_particles is None else {"num_particles": self.num_particles}
        return {"mean": self.mean, "se": self.se, "kind": self.kind, **draws}


@dataclass(frozen=True)
class Comparison:
    """The scores of held-out rows by a density and by a Gaussian, the least that a flow has to beat."""

    test: Score
    baseline: Score

    @property
    def gain(self) -> tuple[float, float]:
        """Nats a row over the Gaussian, row by row, and their standard error."""
        gain = self.test.values - self.baseline.values
        return gain.mean().item(), standard_error(gain)

    @property
    def is_better(self) -> bool:
        """Whether the density fits better than the Gaussian, to two standard errors."""
        return self.gain[0] >= 2 * self.gain[1]

    @property
    def verdict(self) -> str:
        """The gain in words."""
        verdict = f"{mean_and_se(*self.gain)} nats a row over the Gaussian, on test rows"
        return verdict if self.is_better else f"No better than the Gaussian: {verdict}"


def mean_and_se(mean: float, se: float) -> str:
    """A mean with its standard error, to three decimals."""
    return f"{mean:.3f} ± {se:.3f}"


def standard_error(values: Tensor) -> float:
    """Of the mean of `(N)`."""
    return (values.std() / math.sqrt(len(values))).item()


@torch.no_grad()
def score(
    density: Density, rows: Tensor, num_particles: int, context: Tensor | None = None
) -> Score:
    """log p of rows; for a bound, its importance-weighted form.

    Args:
        density: with `context_dim`, if there are contexts.
        rows: `(N, *event_shape)`.
        num_particles: draws of a bound.
        context: `(N, C)`.
    """
    density.eval()
    is_estimate = any(map(_estimates, density.modules()))
    if is_estimate and not density.exact_log_prob:
        num_particles = 1  # an estimate of log p: only the bound of one draw is linear in it
    size = CHUNK if density.exact_log_prob else max(1, CHUNK // num_particles)
    values = []
    for start in range(0, len(rows), size):
        at: Any = density
        if context is not None:
            at = at.condition(context[start : start + size])
        part = rows[start : start + size]
        exact = density.exact_log_prob
        values.append(at.log_prob(part) if exact else at.log_prob_bound(part, num_particles))
    found = torch.cat(values).double()
    if not density.exact_log_prob:
        return Score(found, "bound", num_particles)
    return Score(found, "estimate" if is_estimate else "exact")


def compare_to_gaussian(
    density: Density,
    rows: Sequence[Tensor],
    contexts: Sequence[Tensor] | None = None,
    num_particles: int = 100,
) -> Comparison:
    """Scores test rows by a density, and by a Gaussian with the moments of its training rows.

    Args:
        density: a trained density.
        rows: those to train on, to validate with and to test.
        contexts: of the same three parts.
        num_particles: draws of a bound.
    """
    test = score(density, rows[2], num_particles, None if contexts is None else contexts[2])
    baseline = gaussian_score(
        rows,
        contexts,
        num_levels=int(density.num_levels) if isinstance(density, Dequantized) else None,
        # An estimate has the bound of one draw.
        num_particles=test.num_particles or num_particles,
    )
    return Comparison(test, baseline)


def gaussian_score(
    rows: Sequence[Tensor],
    contexts: Sequence[Tensor] | None = None,
    *,
    num_levels: int | None = None,
    num_particles: int = 100,
) -> Score:
    """log p of test rows by the Gaussian of `gaussian`, or by the conditional one where there are contexts.

    Args:
        rows: those to train on, to validate with and to test.
        contexts: of the same three parts.
        num_levels: as in `gaussian`.
        num_particles: draws of a bound.
    """
    train, validation, test = (part.flatten(1) for part in rows)
    if contexts is None:
        return score(gaussian(train, validation, num_levels), test, num_particles)
    with_contexts = [torch.cat([p.flatten(1), c], -1) for p, c in zip(rows, contexts, strict=True)]
    joint, marginal = (gaussian_score(parts).values for parts in (with_contexts, contexts))
    return Score(joint - marginal, "exact")


def gaussian(train: Tensor, validation: Tensor, num_levels: int | None = None) -> Density:
    """The Gaussian with the moments of the training rows, as a density of the data to compare a flow with.

    Args:
        train: rows `(N, *)`.
        validation: rows that select how far the covariance is shrunk towards its diagonal.
        num_levels: L, for whole numbers 0 ... L - 1, dequantized uniformly.

    Raises:
        ValueError: for constant columns.
    """
    train, validation = train.flatten(1), validation.flatten(1)
    rows = train if num_levels is None else (train + torch.rand_like(train)) / num_levels
    standardize = Standardize.from_data(rows, 1)
    y = standardize.forward_and_ladj(rows)[0].double()
    covariance = torch.cov(y.T, correction=0).reshape(2 * y.shape[1:])
    best: tuple[float, Density] | None = None
    for share in SHRINKAGE:
        mixed = torch.lerp(covariance, covariance.diagonal().diag(), share)
        factor, failed = torch.linalg.cholesky_ex(mixed)
        # Below that a column is the sum of others to the precision of single numbers.
        if failed or factor.diagonal().min() < MIN_SCALE:
            continue
        whitening = Whitening(y.mean(0).to(train), factor.to(train))
        density: Density = FlowDistribution(normal(train.shape[1]), whitening)
        density.standardize(standardize.loc, standardize.scale)
        if num_levels is not None:
            density = Dequantized(density, num_levels=num_levels, logit_alpha=None)
        value = score(density, validation, 1).mean
        if best is None or value > best[0]:
            best = value, density
    if best is None:
        raise ValueError(
            "train: expected columns with a variance, got a constant one; leave it out"
        )
    return best[1]


def _estimates(module: torch.nn.Module) -> bool:
    """Whether this estimates its log-det in eval mode."""
    return isinstance(module, ResidualFlow) and module.event_shape.numel() > EXACT_DIM
