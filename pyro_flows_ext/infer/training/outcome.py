"""The result of a run of training."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from pyro.infer.autoguide import AutoGuide

from .._loop import warn_of_skipped
from .result import FitResult
from .verdict import advice, sentences

if TYPE_CHECKING:
    from .run import Run

# Windows of this share of a fixed run, in its middle and at its end, are compared for convergence. The last two would not
# do: a rate that falls to nothing levels any loss.
WINDOW, TOLERANCE = 0.1, 0.1


def outcome(run: Run, reason: str, trusted: bool, begin: float) -> FitResult:
    """The result of a run that has ended."""
    losses = torch.tensor(run.state.losses, dtype=torch.float64)
    skipped = int(losses.isnan().sum())
    warn_of_skipped(skipped, len(losses))
    importance = None if run.check is None else run.check.importance
    refined = None if run.check is None else run.check.refined
    findings = [] if run.check is None else run.check.findings
    caveats = [] if run.check is None else run.check.caveats
    if run.problem is not None:
        findings = [run.problem, *findings]
    window_elbo, window_se, level = _window(losses)
    elbo, elbo_se = window_elbo, window_se
    if importance is not None and not run.options.is_fixed:
        elbo, elbo_se = importance.elbo, importance.elbo_se
    return FitResult(
        guide=run.guide,
        trusted=trusted,
        reason="trusted" if trusted else reason,
        advice=tuple(
            sentences(caveats) if trusted else advice(reason, importance, refined, findings)
        ),
        importance=importance,
        refined=refined,
        elbo=elbo,
        elbo_se=elbo_se,
        losses=losses,
        converged=trusted or reason == "level" or (run.options.is_fixed and level),
        steps=len(losses),
        skipped_steps=skipped,
        seconds=time.perf_counter() - begin,
        warm_start=run.warm_start,
        compiled=run.trainer.compiled is not None,
        _draw=run.draw if isinstance(run.guide, AutoGuide) else None,
        _program=(run.model, run.args, run.kwargs),
    )


def mean_and_se(window: torch.Tensor) -> tuple[float, float]:
    """The mean of what is finite, and its standard error."""
    window = window[window.isfinite()]
    if len(window) < 2:
        return (window.mean().item() if len(window) else math.nan), math.inf
    return window.mean().item(), (window.std() / len(window) ** 0.5).item()


def _window(losses: torch.Tensor) -> tuple[float, float, bool]:
    """Mean and standard error of the bound over the last tenth of steps, and whether it is level with the middle ones."""
    if not len(losses):
        return math.nan, math.inf, True
    size, middle = max(1, int(WINDOW * len(losses))), len(losses) // 2
    mean, se = mean_and_se(losses[-size:])
    before, before_se = mean_and_se(losses[middle : middle + size])
    # Comparisons with NaN are False: an estimate that is not there is not level.
    return -mean, se, before - mean <= TOLERANCE + 2 * math.hypot(se, before_se)
