"""`pyro-flows fit` and `demo`: train a guide, judge it, and write what came of it."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoGuide

from .. import __version__
from ..diagnostics import ImportanceResult, ParameterSummary, importance, plots, summary
from ..diagnostics.export import to_inference_data, to_netcdf_bytes
from ..diagnostics.summary import mean_and_sd, print_table, rounded, to_csv
from ..infer import FitResult, fit
from ..programs import check_finite_log_joint
from ..results import GuideSpec, digest, guide_to_bytes
from ..testing.targets import TARGETS, Data, Target
from .failures import failing_with, located
from .output import Output, json_bytes, png_bytes
from .targets import load_target

# More rows scroll away; summary.csv has all of them.
MAX_ROWS = 50


@dataclass(frozen=True)
class Fitted:
    """A trained guide and its weighed draws. `result` is None for a run that was stopped, by `stopped`."""

    target: Target
    guide: AutoGuide
    result: FitResult | None
    weights: ImportanceResult
    stopped: KeyboardInterrupt | None = None

    @property
    def trusted(self) -> bool:
        """Whether the draws may be taken for the posterior's."""
        return self.stopped is None and self.weights.reliable

    @property
    def verdict(self) -> str:
        """In one line, for pictures and files."""
        weights = self.weights
        state = "" if self.stopped is None else "Unfinished. "
        return f"{state}{weights.verdict.split(':')[0]}: k-hat {weights.k_hat:.2f}, ESS {weights.efficiency:.0%}"

    @cached_property
    def draws(self) -> dict[str, Any]:
        """The draws to show: reweighted ones where the weights are reliable, and otherwise the guide's own."""
        return self.weights.resample() if self.weights.reliable else self.weights.samples


def fit_command(args: argparse.Namespace, output: Output) -> None:
    """Fits a guide to a model, and writes the guide, its verdict, draws, a summary and pictures."""
    with failing_with(2, ValueError, TypeError, OSError):
        target, data = load_target(args.target, args.data)
        spec = GuideSpec(args.guide, args.num_layers)
        spec.build(target.model)  # to refuse impossible options before anything else happens
        check_finite_log_joint(target.model, kwargs=data)
    fitted = _train(target, data, spec, args)
    file = None if args.data is None else str(args.data.resolve())
    report = _report(fitted, spec, data, args)
    output.save(
        {
            "guide.pt": guide_to_bytes(target.name, spec, fitted.guide, data, file),
            "fit.json": json_bytes(report),
        }
    )
    exported = _Export(fitted, data, args)
    output.add("summary.csv", lambda: to_csv(exported.rows).encode())
    output.add("posterior.nc", lambda: to_netcdf_bytes(exported.data))
    output.add("posterior.png", lambda: _posterior_png(fitted, exported.draws))
    if fitted.result is not None:
        output.add("loss.png", lambda: _loss_png(fitted))
    output.add("fit.json", lambda: json_bytes({**report, **_files(output)}))
    if not args.quiet:
        print_fit(fitted, exported)
        _print_levels(data)
        print(f"wrote {', '.join(output.written)} to {args.output}")
    if fitted.stopped is not None:
        raise fitted.stopped


def demo_command(args: argparse.Namespace, output: Output) -> None:
    """Fits eight schools with independent normals and with a flow, and compares."""
    target = TARGETS["eight-schools"]
    print(f"{target.description}: independent normals against an inverse autoregressive flow, {args.steps} steps each")  # fmt: skip
    fits = {}
    for kind in ("normal", "iaf"):
        fits[kind] = fitted = _train(target, target.data(), GuideSpec(kind), args)
        if fitted.stopped is not None:
            raise fitted.stopped
        draws = _Export(fitted, target.data(), args).draws
        output.add(f"posterior-{kind}.png", lambda f=fitted, d=draws: _posterior_png(f, d))  # type: ignore[misc]
        output.add(f"loss-{kind}.png", lambda f=fitted: _loss_png(f))  # type: ignore[misc]
    print_comparison(target, fits, ("mu", "tau"))
    print("mean ± sd; the reference is 10,000 draws of NUTS (posteriordb); ESS in draws of the posterior per draw")  # fmt: skip
    print(f"wrote pictures to {args.output}")


def _train(target: Target, data: Data, spec: GuideSpec, args: argparse.Namespace) -> Fitted:
    """Fits a new guide and weighs its draws; a guide that was interrupted as far as it came."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    result = stopped = None
    arguments: dict[str, Any] = dict(data)
    # Settings and models that cannot be fitted are bad input; whatever else a model raises is a failure of the fit.
    with failing_with(1, Exception), failing_with(2, ValueError, TypeError):
        guide = spec.build(target.model)
        try:
            result = fit(
                target.model,
                guide,
                **arguments,
                num_steps=args.steps,
                lr=args.lr,
                num_particles=args.particles,
                seed=args.seed,
                progress=not args.quiet and sys.stderr.isatty(),  # a log would fill with bars
            )
        except KeyboardInterrupt as stop:
            if guide.prototype_trace is None:  # nothing to keep
                raise
            stopped = stop
    with failing_with(1, Exception):
        weights = importance(target.model, guide, num_samples=args.num_samples, **arguments)
    return Fitted(target, guide, result, weights, stopped)


class _Export:
    """The draws of a guide with deterministic sites, as ArviZ holds them; without, where these cannot be computed."""

    def __init__(self, fitted: Fitted, data: Data, args: argparse.Namespace):
        self.draws: Mapping[str, Any] = fitted.weights.samples
        self._data = self._error = None
        arguments: dict[str, Any] = dict(data)
        try:
            self._data = to_inference_data(
                fitted.target.model,
                fitted.guide,
                **arguments,
                num_samples=args.num_samples,
                # Without new data for every draw: they would outweigh the draws, and not every model can make them.
                posterior_predictive=False,
                log_likelihood=True if args.log_likelihood else "auto",
            )
        except Exception as error:  # of the user's model, among others
            self._error = error
        else:
            group = self._data["posterior"]
            self.draws = {str(name): group[name].values[0] for name in group.data_vars}
        self.rows: list[ParameterSummary] = summary(self.draws)

    @property
    def data(self) -> Any:
        """`arviz.InferenceData` or `xarray.DataTree`."""
        if self._error is not None:
            raise RuntimeError(located(self._error)) from self._error
        return self._data


# --- files ---


def _report(
    fitted: Fitted, spec: GuideSpec, data: Data, args: argparse.Namespace
) -> dict[str, Any]:
    """The content of fit.json."""
    weights, result = fitted.weights, fitted.result
    return {
        "target": fitted.target.name,
        "status": "finished" if fitted.stopped is None else "unfinished",
        "trusted": fitted.trusted,
        "verdict": weights.verdict,
        **{
            name: getattr(weights, name)
            for name in ("k_hat", "ess", "efficiency", "num_samples", "elbo", "elbo_se")
        },
        "log_evidence": weights.log_evidence,
        "log_evidence_se": weights.log_evidence_se,
        "guide": {"kind": spec.kind, "num_layers": spec.depth},
        "steps": None if result is None else result.steps,
        "skipped_steps": None if result is None else result.skipped_steps,
        "converged": None if result is None else result.converged,
        "seconds": None if result is None else result.seconds,
        "seed": args.seed,
        "settings": {name: getattr(args, name) for name in ("steps", "lr", "particles", "threads")},
        "data": {
            "file": None if args.data is None else str(args.data),
            "sha256": digest(data),
            "levels": getattr(data, "levels", {}),
        },
        "versions": {
            "pyro_flows_ext": __version__,
            "torch": torch.__version__,
            "pyro-ppl": pyro.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def _files(output: Output) -> dict[str, Any]:
    return {"files": output.written, "not_written": output.failed}


def _posterior_png(fitted: Fitted, draws: Mapping[str, Any]) -> bytes:
    """The guide's draws under the verdict, with the reweighted ones over them where their weights are reliable."""
    reference = fitted.weights.resample() if fitted.weights.reliable else None
    axes = plots.posterior(draws, reference=reference, labels=("guide", "reweighted"))
    figure = axes.flat[0].figure
    plots.write_verdict(figure, fitted.verdict, fitted.trusted)
    return png_bytes(figure)


def _loss_png(fitted: Fitted) -> bytes:
    figure: Any = plots.loss(fitted.result).figure
    plots.write_verdict(figure, fitted.verdict, fitted.trusted)
    return png_bytes(figure)


# --- the terminal ---


def print_fit(fitted: Fitted, exported: _Export) -> None:
    """A table of the parameters, beside the reference where the target has one, and how good the guide is."""
    reference = fitted.target.reference or {}
    columns = ["mean", "sd", "5 %", "50 %", "95 %", *(["reference"] if reference else [])]
    rows = []
    for row in exported.rows[:MAX_ROWS]:
        values = (row.mean, row.sd, row.q05, row.q50, row.q95)
        cells = [row.parameter, *(rounded(value, row.sd) for value in values)]
        if reference:
            known = row.parameter in reference
            cells.append(mean_and_sd(*reference[row.parameter]) if known else "")
        rows.append(cells)
    print_table(f"{fitted.target.name}, {type(fitted.guide).__name__}", "parameter", columns, rows)
    if len(exported.rows) > MAX_ROWS:
        print(f"and {len(exported.rows) - MAX_ROWS} more in summary.csv")
    print(fitted.weights)
    result = fitted.result
    if result is None:
        print("Unfinished: the run was stopped, and this is the state it had reached.")
        return
    print(f"{result.steps} steps in {result.seconds:.1f} s")
    if not result.converged:
        print("The bound was still rising at the end: take more steps.")
    if result.skipped_steps:
        print(f"{result.skipped_steps} steps without a finite loss and gradient were skipped.")


def print_comparison(target: Target, fits: Mapping[str, Fitted], parameters: Sequence[str]) -> None:
    """One row a guide, below the reference: the parameters (mean ± sd), k-hat, ESS, ELBO and time."""
    reference = target.reference or {}
    rows = [["reference", *(mean_and_sd(*reference[p]) for p in parameters), *4 * [""]]]
    for name, fitted in fits.items():
        by_name = {row.parameter: row for row in summary(fitted.weights.samples)}
        weights, result = fitted.weights, fitted.result
        rows.append(
            [
                name,
                *(mean_and_sd(by_name[p].mean, by_name[p].sd) for p in parameters),
                f"{weights.k_hat:.2f}",
                f"{weights.efficiency:.0%}",
                f"{weights.elbo:.2f} ± {weights.elbo_se:.2f}",
                "" if result is None else f"{result.seconds:.0f} s",
            ]
        )
    print_table(target.name, "guide", [*parameters, "k-hat", "ESS", "ELBO", "time"], rows)


def _print_levels(data: Data) -> None:
    for name, levels in getattr(data, "levels", {}).items():
        shown = ", ".join(f"{i} = {level}" for i, level in enumerate(levels[:10]))
        print(f"{name}: {shown}{', ...' if len(levels) > 10 else ''}")
