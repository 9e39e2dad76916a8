"""`guide="auto"`: guides of growing richness, each from where the last one ended, until one is trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch

from ...guides import AutoCIF, AutoFlow
from ...programs import Program
from ...transforms import ComposeFlow, FlowTransform, LULinear, iaf, nsf
from ..warm_start import Mode
from .result import FitResult

# The exact guides in turn, and the most steps of each; what is left of `max_steps` where there is no number. Layers start
# near the identity.
EXACT: tuple[tuple[str, Callable[[int], FlowTransform], int | None], ...] = (
    ("gaussian", LULinear, 250),
    ("iaf", iaf, 1000),
    ("nsf", nsf, 1500),
)


def fit_enlarging(
    train: Callable[..., FitResult],
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    max_steps: int,
) -> FitResult:
    """The result of the first guide that is trusted: "gaussian", "iaf", "nsf" or "cif"; else of the one with the best bound.

    A Gaussian is a linear layer between the learned tails of `AutoFlow` and its base. Each further exact guide is the last one,
    trained, behind new layers. Modes that are not covered go to `AutoCIF` at once, which starts as wide as all modes.

    Args:
        train: trains one guide: `train(guide, max_steps, warm_start=..., modes=...)`.
    """
    results: list[FitResult] = []
    modes: list[Mode] = []
    guide: AutoFlow | None = None
    left, tried = max_steps, list[str]()
    for name, make, most in EXACT:
        guide = _enlarged(model, make, guide, args, kwargs)
        tried.append(name)
        steps = left if most is None else min(left, most)
        result = train(guide, steps, warm_start=not results, modes=modes)
        results.append(result)
        modes = modes or list(result.warm_start.modes if result.warm_start else [])
        left -= result.steps
        _forget(guide)
        if _is_over(result) or left <= 0 or _misses_modes(result):
            break
    if guide is not None and not _is_over(results[-1]) and left > 0:
        tried.append("cif")
        cif = _indexed(model, guide, modes, args, kwargs)
        results.append(train(cif, left, warm_start=False, modes=modes))
    complete = [result for result in results if not _misses_modes(result)]
    best = max(complete or results[-1:], key=lambda result: result.elbo)
    if _is_over(results[-1]):
        best = results[-1]
    return replace(best, tried=tuple(tried), warm_start=results[0].warm_start)


def _is_over(result: FitResult) -> bool:
    return result.trusted or result.reason in ("interrupted", "not finite")


def _misses_modes(result: FitResult) -> bool:
    return any("not covered" in text for text in result.advice)


def _enlarged(
    model: Program,
    make: Callable[[int], FlowTransform],
    last: AutoFlow | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AutoFlow:
    """A guide that is set up: the layers of `make`, and behind them the flow, tails and whitening of the last guide."""
    if last is None:
        guide = AutoFlow(model, make)
        guide.setup(*args, **kwargs)
        return guide
    flow, *behind = last.transform
    guide = AutoFlow(model, lambda D: ComposeFlow([make(D), flow]))
    guide.setup(*args, **kwargs)
    for new, old in zip(list(guide.transform)[1:], behind, strict=True):
        new.load_state_dict(old.state_dict())
    return guide


def _indexed(
    model: Program,
    last: AutoFlow,
    modes: Sequence[Mode],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AutoCIF:
    """A CIF at the mean of the modes, with the covariance of the last guide's whitening and that between the modes."""
    # Coupling splines, which take a third of the time, collapse to one mode here.
    guide = AutoCIF(model, transform="nsf-ar")
    guide.setup(*args, **kwargs)
    whitening = last.whitening
    loc, scale_tril = whitening.loc, whitening.scale_tril
    if len(modes) > 1:
        points = torch.stack([mode.loc for mode in modes]).to(loc)
        weights = (
            torch.tensor([mode.log_mass for mode in modes], dtype=torch.float64).softmax(0).to(loc)
        )
        loc = weights @ points
        apart = weights.sqrt().unsqueeze(-1) * (points - loc)
        scale_tril = torch.linalg.cholesky(scale_tril @ scale_tril.mT + apart.mT @ apart)
    guide.whiten(loc, scale_tril)
    return guide


def _forget(guide: Program) -> None:
    """Takes a guide's parameters out of Pyro's store: the next one has the same names."""
    store = pyro.get_param_store()
    own = {id(p) for p in guide.parameters()} if isinstance(guide, torch.nn.Module) else set()
    for name, value in list(store.named_parameters()):
        if id(value) in own:
            del store[name]
