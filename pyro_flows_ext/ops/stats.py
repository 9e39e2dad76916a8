"""Statistics of importance weights: Pareto smoothing, its diagnostic k-hat, and the effective sample size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

# The shape of a tail is not estimated from fewer distinct values than this.
MIN_TAIL = 5
# Weights that differ by no more than this many units in the last place of their largest logarithm are one constant
# with rounding noise; the shape of that noise is not a property of the guide.
ROUNDING_ULPS = 16
# Numbers that `torch.quantile` is given at a time: it takes 16 million at most.
QUANTILE_CHUNK = 10_000_000


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Returns 1 / Σ w̄² with w̄ the weights normalised to sum to one: the size of an equally weighted sample.

    Args:
        log_weights: `(*, S)`, in nats.

    Returns:
        `(*)`, in [1, S], float64; NaN where a weight is NaN or +inf, or where all are zero.

    Example:
        >>> round(effective_sample_size(torch.zeros(8)).item(), 4)
        8.0

    References:
        Kong 1992, A note on importance sampling using standardized weights.
    """
    log_weights = log_weights.double()
    return torch.exp(2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1))


def quantiles(draws: Tensor, q: Sequence[float] | Tensor) -> Tensor:
    """Returns the quantiles of each number over its draws, elementwise: `(Q, *shape)`, for any shape.

    Args:
        draws: `(S, *shape)`.
        q: the levels, `(Q)`.

    Example:
        >>> quantiles(torch.arange(5.0).unsqueeze(-1), [0.5])
        tensor([[2.]])
    """
    q = torch.as_tensor(q).to(draws)
    columns = draws.reshape(len(draws), -1)
    parts = columns.split(max(1, QUANTILE_CHUNK // len(draws)), 1)
    return torch.cat([p.quantile(q, dim=0) for p in parts], -1).reshape(*q.shape, *draws.shape[1:])


def pareto_smooth(log_weights: Tensor, *, magnitude: float = 0.0) -> tuple[Tensor, Tensor]:
    """Replaces the largest min(S / 5, 3 √S) importance weights by quantiles of a generalised Pareto fitted to them (PSIS).

    The weights have 1 / k finite moments; their mean is a usable estimate while k-hat < min(1 - 1 / log10(S), 0.7).
    If no tail can be fitted, the weights are returned unchanged, and k-hat is -inf for a tail that is constant up to
    rounding; +inf with fewer than five draws in the tail, so always for S <= 20; NaN where
    a weight is NaN or +inf, or all are zero. Weights of zero (-inf) count as draws. Arithmetic is in float64; O(S log S).

    Args:
        log_weights: `(S)`, in nats, not normalised.
        magnitude: the largest of the numbers that the log-weights are differences of, and have the rounding errors of.

    Returns:
        The smoothed log-weights `(S)`, in their dtype, none above the largest raw one, and k-hat, the estimated shape of
        the tail, a 0-dim float64 tensor.

    Raises:
        ValueError: unless `log_weights` is a non-empty vector.

    Example:
        >>> _, k_hat = pareto_smooth(torch.zeros(100))
        >>> k_hat.item()
        -inf

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed importance sampling, with its weak prior on k; Zhang &
        Stephens 2009, A new and efficient estimation method for the generalized Pareto distribution.
    """
    if log_weights.dim() != 1 or log_weights.numel() == 0:
        raise ValueError(
            f"log_weights: expected a non-empty vector (S,), got shape {tuple(log_weights.shape)}"
        )
    raw, S = log_weights.detach().double(), log_weights.numel()
    largest = raw.max()  # NaN if any is
    if not largest.isfinite():
        return log_weights, raw.new_tensor(math.nan)
    size = math.ceil(min(S / 5, 3 * S**0.5))
    if size < MIN_TAIL:
        return log_weights, raw.new_tensor(math.inf)
    eps = torch.finfo(log_weights.dtype).eps
    noise = ROUNDING_ULPS * eps * max(1.0, float(largest.abs()), magnitude)
    order = raw.argsort()
    if largest - raw[order[-size - 1]] <= noise:
        return log_weights, raw.new_tensor(-math.inf)

    x = raw[order] - largest
    # Weights that underflow relative to the largest one are equal; the paper's tail starts above them.
    cutoff = x[-size - 1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    tail = x[x > cutoff]
    if len(tail) < MIN_TAIL:
        return log_weights, raw.new_tensor(math.inf if len(tail) else -math.inf)

    # eˣ - eᶜ without the cancellation that would make ties of a tail narrower than float64 resolves.
    excess = -torch.exp(tail) * torch.expm1(cutoff - tail)
    scale = excess[-1]
    k, sigma = fit_generalized_pareto((excess / scale).cpu())
    if not (math.isfinite(k) and math.isfinite(sigma) and sigma > 0):
        return log_weights, raw.new_tensor(math.inf)

    probability = (torch.arange(len(tail), dtype=x.dtype, device=x.device) + 0.5) / len(tail)
    fitted = scale * _generalized_pareto_quantile(probability, k, sigma)
    smoothed = raw.clone()
    smoothed[order[-len(tail) :]] = torch.log(cutoff.exp() + fitted).clamp(max=0.0) + largest
    return smoothed.to(log_weights.dtype), raw.new_tensor(k)


def _generalized_pareto_quantile(p: Tensor, k: float, sigma: float) -> Tensor:
    """sigma ((1 - p)⁻ᵏ - 1) / k, and its limit -sigma log(1 - p) at k = 0."""
    log_survival = torch.log1p(-p)
    if abs(k) < torch.finfo(p.dtype).eps:
        return -sigma * log_survival
    return sigma * torch.expm1(-k * log_survival) / k
