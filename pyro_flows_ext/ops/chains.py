"""Statistics of several Markov chains: R-hat and effective sample size, after rank normalisation."""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import gelman_rubin
from torch import Tensor

from .stats import quantiles

# Half a chain needs two draws for a variance.
MIN_DRAWS = 4


def r_hat(draws: Tensor) -> Tensor:
    """Split R-hat of each number over C chains of S draws: `(C, S, *shape)` -> `(*shape)`, float64.

    R-hat² compares the variance over all chains with the variance within them. Every chain is split in two. The value
    is the larger one of two R-hats: of the rank-normalised draws, and of their rank-normalised distances from the
    median, which differ where chains agree in location and not in scale. Near 1 for chains that agree; NaN where a draw is not finite; 1 for a
    constant.

    Raises:
        ValueError: for fewer than two chains or four draws.

    References:
        Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, Rank-normalization, folding, and localization: an improved
        R-hat for assessing convergence of MCMC.
    """
    draws = _checked(draws)
    folded = (draws - quantiles(draws.flatten(0, 1), [0.5])[0]).abs()
    both = torch.stack([gelman_rubin(_split(normal_scores(x))) for x in (draws, folded)])
    return _where_defined(draws, both.amax(0), 1.0)


def bulk_ess(draws: Tensor) -> Tensor:
    """Effective sample size of the bulk over C chains of S draws: `(C, S, *shape)` -> `(*shape)`, float64.

    The number of independent draws whose mean would vary as much, of the rank-normalised draws:
    C S / (1 + 2 Σ_t ρ_t), summed as far as Geyer's initial monotone sequence. The autocorrelation ρ_t is about the mean of all
    chains, which a chain of a few draws has no good estimate of; chains that disagree stay correlated, so that their
    size is small. At most C S log10(C S), for draws that are better than independent. NaN where a draw is not finite;
    C S for a constant.

    Raises:
        ValueError: for fewer than two chains or four draws.

    References:
        Vehtari et al. 2021 (see `r_hat`); Geyer 1992, Practical Markov chain Monte Carlo.
    """
    draws = _checked(draws)
    C, S = draws.shape[:2]
    total, most = C * S, C * S * math.log10(C * S)
    x = normal_scores(draws)
    spectrum = torch.fft.rfft(x - x.mean((0, 1)), n=2 * S, dim=1)
    products = torch.fft.irfft(spectrum.abs().square().sum(0), n=2 * S, dim=0)[:S]
    pairs = torch.arange(S, 0, -1, dtype=x.dtype, device=x.device)
    rho = products / pairs.reshape(-1, *[1] * (x.dim() - 2))
    rho = rho / rho[0].clamp(min=torch.finfo(x.dtype).tiny)
    # Sums of neighbours are positive and fall for a reversible chain; from the first one that is not, they are noise.
    sums = rho[: S // 2 * 2].reshape(S // 2, 2, *rho.shape[1:]).sum(1)
    sums = sums.clamp(min=0.0).cummin(0).values
    ess = total / (2 * sums.sum(0) - 1).clamp(min=total / most)
    return _where_defined(draws, ess, float(total))


def normal_scores(draws: Tensor, reference: Tensor | None = None) -> Tensor:
    """Φ⁻¹ of the rank of each number among N of a reference, elementwise: `(*, *shape)`, `(N, *shape)` -> `(*, *shape)`.

    A monotone map that makes the reference standard normal. Ranks are (r - 3/8) / (N + 1/4), with the mean
    rank of ties. The reference is by default all draws of all chains, `(C, S, *shape)`.

    References:
        Blom 1958, Statistical estimates and transformed beta-variables.
    """
    reference = draws.flatten(0, 1) if reference is None else reference
    columns = reference.reshape(len(reference), -1)
    ordered = columns.sort(0).values.mT.contiguous()
    values = draws.reshape(-1, columns.shape[1]).mT.contiguous()
    below = torch.searchsorted(ordered, values, side="left")
    up_to = torch.searchsorted(ordered, values, side="right")
    rank = (below + up_to + 1).to(draws) / 2
    return torch.special.ndtri((rank - 0.375) / (len(reference) + 0.25)).mT.reshape(draws.shape)


def _checked(draws: Tensor) -> Tensor:
    if draws.dim() < 2 or draws.shape[0] < 2 or draws.shape[1] < MIN_DRAWS:
        raise ValueError(
            f"draws: expected (C, S, *shape) with at least 2 chains of {MIN_DRAWS} draws, got shape {tuple(draws.shape)}"
        )
    return draws.detach().double()


def _split(draws: Tensor) -> Tensor:
    """The halves of every chain as chains of their own; the middle draw of an odd number is left out."""
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]])


def _where_defined(draws: Tensor, statistic: Tensor, of_constant: float) -> Tensor:
    """The statistic, `of_constant` where all draws are the same, and NaN where one is not finite."""
    flat = draws.flatten(0, 1)
    statistic = torch.where((flat == flat[0]).all(0), of_constant, statistic)
    return torch.where(flat.isfinite().all(0), statistic, torch.nan)
