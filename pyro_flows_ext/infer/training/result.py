"""What `fit` returns: the verdict, the draws, and how they came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...programs import Program
from ..importance import ImportanceResult
from ..warm_start import WarmStart

if TYPE_CHECKING:
    import pandas as pd

    from ..refine import RefineResult

# Rows of the printed table.
TABLE_ROWS = 20


@dataclass(frozen=True)
class FitResult:
    """A trained guide, draws of the posterior, and whether to trust them.

    Attributes:
        guide: the guide, with the best parameters seen.
        trusted: whether effective sample size, k-hat and chains that start from the guide's draws all agree that
            `sample` returns draws of the posterior.
        reason: "trusted", "level" (more steps of this guide gain nothing), "out of steps", "fixed" (`num_steps=`),
            "interrupted", or "not finite" (100 steps in a row; the best state seen is returned).
        advice: what to try next, one sentence each; where trusted, only latents whose tails have no variance.
        importance: the last draws of the guide with their weights; None where the model gives none (mini-batches).
        refined: chains of HMC in the guide's coordinates, where they were run.
        elbo, elbo_se: the bound in nats and its standard error: of the weighted draws, else of the last steps.
        losses: minus the bound of every step `(steps)`, float64, NaN where a step was skipped.
        warm_start: the Gaussian that the guide started from, or None.
        compiled: whether the last steps ran compiled.
        tried: with `guide="auto"`, the guides tried so far, the simplest first: "gaussian", "iaf", "nsf", "cif".
    """

    guide: Program = field(repr=False)
    trusted: bool
    reason: str
    advice: tuple[str, ...]
    importance: ImportanceResult | None = field(repr=False)
    refined: RefineResult | None = field(repr=False)
    elbo: float
    elbo_se: float
    losses: Tensor = field(repr=False)
    converged: bool
    steps: int
    skipped_steps: int
    seconds: float
    warm_start: WarmStart | None = field(repr=False, default=None)
    compiled: bool = False
    tried: tuple[str, ...] = ()
    _draw: Callable[[int], dict[str, Tensor]] | None = field(repr=False, default=None)
    _program: tuple[Program, tuple[Any, ...], Mapping[str, Any]] | None = field(
        repr=False, default=None
    )

    def sample(self, num_samples: int = 1000, *, raw: bool = False) -> dict[str, Tensor]:
        """Draws of the posterior: site -> `(num_samples, *shape)`.

        From the chains where they ran and mixed; otherwise the guide's draws resampled by Pareto-smoothed weights, where
        k-hat allows it; otherwise, and with `raw=True`, the guide's own draws.

        Raises:
            ValueError: for a number of draws that is not positive.
        """
        if int(num_samples) != num_samples or num_samples < 1:
            raise ValueError(f"num_samples: expected a positive integer, got {num_samples!r}")
        if not raw and self.refined is not None and self.refined.mixed:
            return self.refined.flat(num_samples)
        if not raw and self.importance is not None and self.importance.reliable:
            return self.importance.resample(num_samples)
        if self._draw is None:
            raise ValueError(
                "sample: this guide has no sample_posterior; draw by pyro.infer.Predictive"
            )
        return self._draw(num_samples)

    def summary(self, num_samples: int = 4000) -> pd.DataFrame:
        """Mean, sd and quantiles of every latent number, from `sample`: a pandas DataFrame, one row each."""
        import pandas as pd

        rows = {}
        for name, value in self.sample(num_samples).items():
            flat = value.double().reshape(len(value), -1)
            quantiles = torch.quantile(
                flat, torch.tensor([0.05, 0.5, 0.95], dtype=flat.dtype, device=flat.device), dim=0
            )
            columns = (flat.mean(0), flat.std(0), *quantiles)
            for i, index in enumerate(_indices(value.shape[1:])):
                rows[f"{name}{index}"] = [column[i].item() for column in columns]
        names = ["mean", "sd", "5%", "50%", "95%"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=names)

    def to_inference_data(self, num_samples: int = 1000, **options: Any) -> Any:
        """The draws for ArviZ, by chain where chains ran: see `diagnostics.to_inference_data` for groups and options."""
        # The front door: imports within the package run the other way.
        import pyro_flows_ext as pf

        if self._program is None:
            raise ValueError("to_inference_data: expected a result of fit, which holds its model")
        model, args, kwargs = self._program
        if self.refined is not None and self.refined.mixed:
            draws = self.refined.samples
        else:
            draws = {name: v.unsqueeze(0) for name, v in self.sample(num_samples).items()}
        return pf.to_inference_data(model, self.guide, *args, draws=draws, **options, **kwargs)

    @property
    def verdict(self) -> str:
        """Whether to trust the draws, in one line."""
        if self.trusted:
            means = "refined draws" if self.refined is not None and self.refined.mixed else "draws"
            return f"Trusted: the {means} follow the posterior ({self._numbers()})."
        why = {
            "level": "more steps gain nothing",
            "out of steps": "out of steps",
            "fixed": "a fixed number of steps, not verified",
            "interrupted": "interrupted",
            "not finite": "steps stopped being finite",
        }
        return f"Not trusted: {why.get(self.reason, self.reason)} ({self._numbers()})."

    def _numbers(self) -> str:
        parts = []
        if self.importance is not None:
            parts.append(f"ESS {self.importance.efficiency:.0%}, k-hat {self.importance.k_hat:.2f}")
        if self.refined is not None:
            parts.append(f"R-hat {self.refined.max_r_hat:.3f}")
        parts.append(f"ELBO {self.elbo:.2f} ± {self.elbo_se:.2g}")
        parts.append(f"{self.steps} steps, {self.seconds:.1f} s")
        return ", ".join(parts)

    def __str__(self) -> str:
        lines = [self.verdict, *self.advice]
        if self.tried:
            lines.insert(1, f"Guides tried: {', '.join(self.tried)}.")
        if self._draw is not None:
            table = self.summary()
            lines.append(table.head(TABLE_ROWS).to_string(float_format=lambda v: f"{v:.4g}"))
            if len(table) > TABLE_ROWS:
                lines.append(f"... {len(table) - TABLE_ROWS} more rows: result.summary()")
        return "\n".join(lines)


def _indices(shape: torch.Size) -> list[str]:
    if not shape:
        return [""]
    return [
        f"[{','.join(map(str, i))}]"
        for i in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist()
    ]
