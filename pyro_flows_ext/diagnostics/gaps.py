"""The gaps of an amortized guide: between the evidence and its bound, by its family and by sharing one network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro.distributions as dist
from torch import Tensor

from ..infer.importance import plus_minus
from ..ops import check_positive
from ..programs import Program
from ..transforms import FlowTransform
from .ais import AISResult, anneal, annealed_importance_sampling, log_mean_weight
from .local_density import LocalDensity, local_density
from .local_fit import Fit, LocalFlow, LocalGaussian, full_rank_planar, log_weights, maximise

FAMILIES = ("gaussian", "flow")
AIS_STARTS = ("prior", "gaussian")
# Draws of the guide that place the local fits.
START_DRAWS = 200


class Estimate(NamedTuple):
    """A mean over data, in nats a datum, and its standard error."""

    mean: float
    se: float

    def __str__(self) -> str:
        return plus_minus(self.mean, self.se)


@dataclass(frozen=True)
class InferenceGaps:
    """log p(x_n) and lower bounds on it, by datum n: `(N)`, float64, in nats.

    Standard errors of the methods are over data, and include Monte Carlo noise.

    Attributes:
        amortized: the ELBO of the guide.
        gaussian, flow: the ELBO of a factorised Gaussian and of a flow fitted to that datum alone.
        evidence: estimates by name: "AIS"; "IWAE guide", "IWAE gaussian", "IWAE flow" by importance weights.
        evidence_se: their Monte Carlo errors.
        fits: steps of the local fits, and whether they converged.
        num_samples: draws behind each bound.
    """

    amortized: Tensor = field(repr=False)
    gaussian: Tensor = field(repr=False)
    flow: Tensor = field(repr=False)
    evidence: dict[str, Tensor] = field(repr=False)
    evidence_se: dict[str, Tensor] = field(repr=False)
    fits: dict[str, Fit]
    num_samples: int

    @property
    def best(self) -> str:
        """The name of the highest estimate of the evidence; all are lower bounds in expectation.

        Highest on average, less two Monte Carlo errors, against noisy estimates. One for all data: the highest of each
        datum would be biased upwards, and no lower bound.
        """

        def surely(name: str) -> float:
            error = self.evidence_se[name].square().sum().sqrt() / len(self.amortized)
            bound = (self.evidence[name].mean() - 2 * error).item()
            return -math.inf if math.isnan(bound) else bound

        return max(self.evidence, key=surely)

    @property
    def log_evidence(self) -> Tensor:
        """`evidence` by the `best` estimate: `(N)`."""
        return self.evidence[self.best]

    def total_gap(self) -> Estimate:
        """log p(x) - ELBO of the guide = E KL(q || p(z | x)): the sum of the other two, in either family."""
        return _over_data(self.log_evidence - self.amortized)

    def approximation_gap(self, family: str) -> Estimate:
        """log p(x) - ELBO of the local fit in `family`: the loss for any encoder."""
        return _over_data(self.log_evidence - self._local(family))

    def amortization_gap(self, family: str) -> Estimate:
        """ELBO of the local fit in `family` - ELBO of the guide: the gain from a better encoder, or from local steps.

        For the guide's own family. In a smaller one it is negative if the guide gains more by its family than it loses by
        its encoder.
        """
        return _over_data(self._local(family) - self.amortized)

    def _local(self, family: str) -> Tensor:
        if family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}; got {family!r}")
        return self.gaussian if family == "gaussian" else self.flow

    def __str__(self) -> str:
        others = ", ".join(
            f"{name} {value.mean():.3f}"
            for name, value in self.evidence.items()
            if name != self.best
        )
        lines = [
            f"{len(self.amortized)} data, nats a datum (mean ± standard error over data), {self.num_samples} draws",
            f"log evidence     {_over_data(self.log_evidence)} by {self.best} ({others})",
            f"amortized bound  {_over_data(self.amortized)}",
            f"total gap        {self.total_gap()}",
            f"{'family':<10}{'local bound':>20}{'approximation gap':>20}{'amortization gap':>20}",
        ]
        for family in FAMILIES:
            local = _over_data(self._local(family))
            cells = (local, self.approximation_gap(family), self.amortization_gap(family))
            fit = self.fits[family]
            rest = f"   {fit.steps} steps" + ("" if fit.converged else ", still rising")
            lines.append(f"{family:<10}" + "".join(f"{cell!s:>20}" for cell in cells) + rest)
        return "\n".join(lines)


def gaps(
    model: Program,
    guide: Program,
    *args: Any,
    flow: Callable[[int], FlowTransform] = full_rank_planar,
    num_samples: int = 1000,
    num_particles: int = 16,
    max_steps: int = 3000,
    ais_start: str = "prior",
    ais_chains: int = 16,
    ais_steps: int = 500,
    chunk_size: int = 100,
    **kwargs: Any,
) -> InferenceGaps:
    """The approximation gap and the amortization gap of an amortized guide.

    Local distributions are fitted to every datum by Adam, from the moments of the guide; the flow starts from the
    fitted Gaussian. Under a subsampled plate, the data are one subsample. Fix global latents by `poutine.condition`.
    Put modules in eval mode: the noise of dropout would count as a gap.
    Cost: `max_steps` gradients twice for `num_particles` draws of every datum, and `ais_steps` times 11 for
    `ais_chains` + 4 chains.

    Args:
        model: a Pyro model with latents local to a data plate.
        guide: `guide(*args, **kwargs)` draws them given the data.
        args, kwargs: the arguments of both.
        flow: D -> a transform, such as the preset `iaf`, copied for every datum; by default planar layers and a linear
            map, a family that contains every Gaussian.
        num_samples, chunk_size: draws behind each bound, and how many at a time.
        num_particles, max_steps: draws a step of the local fits, and their steps.
        ais_start: "prior", which reaches every mode; or "gaussian", the fitted one, which takes fewer steps if the
            posterior is far narrower than the prior, but misses modes that the fit misses.
        ais_chains, ais_steps: see `annealed_importance_sampling`.

    Raises:
        ValueError: if no data plate holds all latents, for a model that does not vectorise, and for a guide without log
            q by datum.

    References:
        Cremer, Li & Duvenaud 2018, Inference Suboptimality in Variational Autoencoders.
    """
    if ais_start not in AIS_STARTS:
        raise ValueError(f"ais_start: expected one of {', '.join(AIS_STARTS)}; got {ais_start!r}")
    for name, value in {
        "num_samples": num_samples,
        "num_particles": num_particles,
        "max_steps": max_steps,
        "chunk_size": chunk_size,
    }.items():
        check_positive(name, value)
    density = local_density(model, guide, args, kwargs)

    start = density.draw_guide(guide, START_DRAWS)[0]
    gaussian = LocalGaussian(start.mean(0), start.std(0))
    fits = {"gaussian": maximise(density, gaussian, num_particles, max_steps)}
    local_flow = LocalFlow(flow(density.dim), gaussian)
    fits["flow"] = maximise(density, local_flow, num_particles, max_steps)
    draws = {
        "guide": lambda num: density.draw_guide(guide, num),
        "gaussian": gaussian.draw,
        "flow": local_flow.draw,
    }
    log_w = {n: log_weights(density, draw, num_samples, chunk_size) for n, draw in draws.items()}
    estimates = {f"IWAE {name}": log_mean_weight(w) for name, w in log_w.items()}
    ais = _ais(density, gaussian if ais_start == "gaussian" else None, ais_chains, ais_steps)
    estimates["AIS"] = ais.log_evidence, ais.log_evidence_se
    return InferenceGaps(
        amortized=log_w["guide"].mean(0),
        gaussian=log_w["gaussian"].mean(0),
        flow=log_w["flow"].mean(0),
        evidence={name: value for name, (value, _) in estimates.items()},
        evidence_se={name: se for name, (_, se) in estimates.items()},
        fits=fits,
        num_samples=num_samples,
    )


def _ais(
    density: LocalDensity, start: LocalGaussian | None, num_chains: int, num_steps: int
) -> AISResult:
    options = {"num_chains": num_chains, "num_steps": num_steps}
    if start is None:
        return anneal(density.prior_and_joint, density.draw_prior, **options)
    q = dist.Normal(start.loc.detach(), start.scale.detach()).to_event(1)
    return annealed_importance_sampling(density, q, **options)


def _over_data(values: Tensor) -> Estimate:
    se = values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), se)
