"""A guide weighed against its model: Pareto k-hat, effective sample size, ELBO and evidence, and better draws."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..ops import effective_sample_size, pareto_smooth
from ..programs import Program, draw_particles

# Below this effective share of the draws, the guide's own draws are far from the posterior's, whatever k-hat says.
LOW_EFFICIENCY = 0.1


@dataclass(frozen=True)
class ImportanceResult:
    """Draws z_n of a guide q with weights w_n = p(x, z_n) / q(z_n), and what the weights say about the guide.

    `samples`: latent site -> `(N, *shape)`; `log_weights`, `smoothed_log_weights` `(N)`, unnormalised, float64.
    `k_hat`: shape of the weights' tail (see `ops.pareto_smooth`). `ess`: effective sample size of the raw weights, in
    [1, N]. `elbo` ± `elbo_se`: mean of the log weights, in nats. `log_evidence` ± `log_evidence_se`: log of the mean
    weight, with the standard error of a logarithm to first order (delta method); the latter means nothing where k-hat
    is large.
    """

    samples: dict[str, Tensor] = field(repr=False)
    log_weights: Tensor = field(repr=False)
    smoothed_log_weights: Tensor = field(repr=False)
    k_hat: float
    ess: float
    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float

    @property
    def num_samples(self) -> int:
        """How many draws were weighed."""
        return self.log_weights.numel()

    @property
    def efficiency(self) -> float:
        """ESS / N: the worth of a draw of the guide in draws of the posterior, in (0, 1]."""
        return self.ess / self.num_samples

    @property
    def max_k_hat(self) -> float:
        """min(1 - 1 / log10(N), 0.7): above it, N weights are too few for a tail so heavy (Vehtari et al. 2024)."""
        return min(1 - 1 / math.log10(max(self.num_samples, 2)), 0.7)

    @property
    def reliable(self) -> bool:
        """Whether the weights may be used: k-hat below `max_k_hat`, and known."""
        return self.k_hat < self.max_k_hat

    def resample(
        self, num_samples: int | None = None, *, replace: bool = True
    ) -> dict[str, Tensor]:
        """Draws of the posterior: site -> `(num_samples, *shape)`, picked by their Pareto-smoothed weights.

        With replacement (sampling importance resampling, Rubin 1987) and as many as there are by default. Without,
        no draw comes twice, but large weights count for too little unless `num_samples` is a small part of N. Sites
        are resampled jointly. Raises `ValueError` when no weight is usable, or too few are for `replace=False`.
        """
        num_samples = self.num_samples if num_samples is None else num_samples
        if num_samples < 1:
            raise ValueError(f"num_samples: expected a positive integer, got {num_samples!r}")
        weights = self.smoothed_log_weights.softmax(0)
        if not bool(weights.isfinite().all()):
            raise ValueError(
                "resample: expected finite weights of which some are not zero, got "
                f"{int(self.log_weights.isfinite().sum())} finite log weights of {self.num_samples}"
            )
        usable = int((weights > 0).sum())
        if not replace and num_samples > usable:
            raise ValueError(
                f"num_samples: expected at most {usable} (the weights above zero) with replace=False, "
                f"got {num_samples}"
            )
        index = torch.multinomial(weights, num_samples, replacement=replace)
        return {name: value[index.to(value.device)] for name, value in self.samples.items()}

    def __str__(self) -> str:
        numbers = (
            f"k-hat {self.k_hat:.2f}   ESS {self.ess:.0f} of {self.num_samples} ({self.efficiency:.1%})   "
            f"ELBO {plus_minus(self.elbo, self.elbo_se)}   "
            f"log evidence {plus_minus(self.log_evidence, self.log_evidence_se)}"
        )
        return f"{numbers}\n{self.verdict}"

    @property
    def verdict(self) -> str:
        """In words: whether the weights can be relied on, and what they cannot show."""
        finite = int((self.log_weights < math.inf).sum())
        if math.isnan(self.k_hat):
            return (
                f"Not reliable: {self.num_samples - finite} weights are NaN or infinite."
                if finite < self.num_samples
                else "Not reliable: every weight is zero; the guide misses the support of the model."
            )
        if self.k_hat == math.inf:
            return (
                "Not reliable: too few distinct large weights to estimate k-hat; weigh more draws."
            )
        if not self.reliable:
            return (
                f"Not reliable: k-hat is not below {self.max_k_hat:.2f}. The guide is too narrow somewhere, so that a "
                "few draws carry the weight: do not trust the evidence or resampled draws."
            )
        if self.efficiency < LOW_EFFICIENCY:
            return (
                f"Usable weights, poor guide: k-hat is below {self.max_k_hat:.2f}, but the draws are worth only "
                f"{self.efficiency:.1%} of their number. Trust weighted draws, not the guide's own."
            )
        return (
            f"Reliable weights: k-hat is below {self.max_k_hat:.2f}. By itself it can mislead (a guide of the wrong "
            "width may pass): read it with the ESS and the ELBO's standard error. No weight shows a mode that the "
            "guide never visits."
        )


def importance(
    model: Program, guide: Program, *args: Any, num_samples: int = 2000, **kwargs: Any
) -> ImportanceResult:
    """Weighs draws of a guide q by w = p(x, z) / q(z).

    Vectorised where model and guide allow it. Enumerated latents of the model are summed out. With auxiliary guide sites
    the weights are those of the extended space: right, but less even than those of the guide's marginal density.

    Args:
        model: a Pyro model that sees the full data.
        guide: any Pyro guide with a density. The two may be swapped where the guide is an `AutoGuide`.
        args, kwargs: their arguments.
        num_samples: how many draws are weighed.

    Returns:
        ImportanceResult: draws, weights, k-hat, effective sample size, ELBO and evidence.

    Raises:
        ValueError: for fewer than two draws, under a subsampled plate, for a latent that the guide does not draw or the
            model observes, and for a guide of points (`AutoDelta`).

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> result = importance(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.5)), num_samples=500)
        >>> result.reliable
        True
    """
    if int(num_samples) != num_samples or num_samples < 2:
        raise ValueError(f"num_samples: expected an integer of at least 2, got {num_samples!r}")
    model, guide = model_first(model, guide)
    particles = draw_particles(model, guide, args, kwargs, num_samples=int(num_samples))
    return weigh(particles.samples, particles.log_joint, particles.log_guide)


def model_first(model: Program, guide: Program) -> tuple[Program, Program]:
    """The model and the guide, swapped if the first is an `AutoGuide` and the second is not."""
    if isinstance(model, AutoGuide) and not isinstance(guide, AutoGuide):
        return guide, model
    return model, guide


def weigh(samples: dict[str, Tensor], log_joint: Tensor, log_guide: Tensor) -> ImportanceResult:
    """The diagnostics of draws `(N, *shape)` by site with log densities log p and log q, `(N)` each.

    The rounding errors of log p and log q stay in their difference, however small it is: under an exact guide the weights
    are that noise, and have no tail.
    """
    log_weights = log_joint - log_guide
    sizes = torch.cat([log_joint, log_guide]).abs()
    magnitude = torch.where(sizes.isfinite(), sizes, 0.0).max()
    smoothed, k_hat = pareto_smooth(log_weights, magnitude=float(magnitude))
    log_weights, N = log_weights.double(), len(log_weights)
    weights = (log_weights - log_weights.max()).exp()
    return ImportanceResult(
        samples=samples,
        log_weights=log_weights,
        smoothed_log_weights=smoothed.double(),
        k_hat=k_hat.item(),
        ess=effective_sample_size(log_weights).item(),
        elbo=log_weights.mean().item(),
        elbo_se=log_weights.std().item() / N**0.5,
        log_evidence=log_weights.logsumexp(0).item() - math.log(N),
        log_evidence_se=(weights.std() / weights.mean()).item() / N**0.5,
    )


def plus_minus(value: float, se: float) -> str:
    """`value ± se` with two digits of the error."""
    if not (math.isfinite(value) and math.isfinite(se)):
        return f"{value:.3g} ± {se:.2g}"
    digits = 1 - math.floor(math.log10(se)) if se > 0 else 4
    digits = min(max(digits, 0), 4)
    return f"{value:.{digits}f} ± {se:.{digits}f}"
