"""`pyro-flows fit` and `demo`: train a guide until its draws can be trusted, and write what came of it."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyro
import torch

from .. import __version__
from ..diagnostics import ParameterSummary, plots, summary
from ..diagnostics.netcdf import to_netcdf_bytes
from ..diagnostics.summary import mean_and_sd, print_table, rounded, to_csv
from ..infer import FitResult, fit
from ..programs import check_finite_log_joint
from ..programs.errors import located
from ..results import GuideSpec, digest, guide_to_bytes
from ..testing.targets import TARGETS, Data, Target, load_target
from .failures import failing_with
from .output import CHECKPOINT, Output, json_bytes, png_bytes

# More rows scroll away; summary.csv has all of them.
MAX_ROWS = 50


def fit_command(args: argparse.Namespace, output: Output) -> None:
    """Fits a guide to a model, and writes the guide, its verdict, draws, a summary and pictures."""
    with failing_with(2, ValueError, TypeError, OSError):
        target, data = load_target(args.target, args.data, args.columns)
        spec = GuideSpec(args.guide, args.num_layers)
        spec.build(target.model)  # to refuse impossible options before anything else happens
        check_finite_log_joint(target.model, kwargs=data)
    result = _train(target, data, spec, args, num_steps=args.steps)
    if not output.is_mine:
        return
    file = None if args.data is None else str(args.data.resolve())
    report = _report(target, result, spec, data, args)
    guide: Any = result.guide
    output.save(
        {
            "guide.pt": guide_to_bytes(target.name, spec, guide, data, file),
            "fit.json": json_bytes(report),
        }
    )
    exported = _Export(result, args)
    output.add("summary.csv", lambda: to_csv(exported.rows).encode())
    output.add("posterior.nc", lambda: to_netcdf_bytes(exported.data))
    output.add("posterior.png", lambda: _posterior_png(result, exported.draws))
    if result.losses.isfinite().any():
        output.add("loss.png", lambda: _loss_png(result))
    else:  # trusted before the first step; a picture of an earlier run would be taken for one of this
        (args.output / "loss.png").unlink(missing_ok=True)
    written = {"files": output.written, "not_written": output.failed}
    output.add("fit.json", lambda: json_bytes({**report, **written}))
    if result.reason != "interrupted":
        (args.output / CHECKPOINT).unlink(missing_ok=True)
    if not args.quiet:
        print_fit(target, args.guide, result, exported.rows)
        _print_levels(data)
        print(f"wrote {', '.join(output.written)} to {args.output}")
    if result.reason == "interrupted":
        raise KeyboardInterrupt


# Steps after which independent normals are level on eight schools.
NORMAL_STEPS = 500


def demo_command(args: argparse.Namespace, output: Output) -> None:
    """Fits eight schools with independent normals and with a flow, and compares."""
    target = TARGETS["eight-schools"]
    print(f"{target.description}: independent normals against an inverse autoregressive flow")
    fits = {}
    for kind in ("normal", "iaf"):
        # Rounds would train the normals on for a trust that they cannot earn.
        steps = NORMAL_STEPS if kind == "normal" and args.steps is None else args.steps
        # Compiling takes longer than so few steps.
        fits[kind] = result = _train(
            target, target.data(), GuideSpec(kind), args, num_steps=steps, compile=False
        )
        if result.reason == "interrupted":
            raise KeyboardInterrupt
    print_comparison(target, fits, ("mu", "tau"))
    print(
        "mean ± sd: of the draws that fit returns where it trusts them, else of the guide's own; the reference is 10,000 "
        "draws of NUTS (posteriordb); k-hat, ESS (draws of the posterior per draw) and ELBO: of the guide",
        flush=True,
    )
    # The table first: pictures import more than the fits take.
    for kind, result in fits.items():
        draws = _Export(result, args).draws
        output.add(f"posterior-{kind}.png", partial(_posterior_png, result, draws))
        if result.losses.isfinite().any():
            output.add(f"loss-{kind}.png", partial(_loss_png, result))
    print(f"wrote pictures to {args.output}")


def _train(
    target: Target,
    data: Data,
    spec: GuideSpec,
    args: argparse.Namespace,
    **options: Any,
) -> FitResult:
    """`fit` with the settings of the command line, and further `options` of it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    # The data are bound: their names may be those of options of `fit`.
    model: Any = partial(target.model, **data) if data else target.model
    checkpoint = args.output / CHECKPOINT if args.checkpoint or args.resume else None
    # Settings and models that cannot be fitted are bad input; whatever else a model raises is a failure of the fit.
    with failing_with(1, Exception), failing_with(2, ValueError, TypeError):
        return fit(
            model,
            spec.build(model),
            max_steps=args.max_steps,
            lr=args.lr,
            num_particles=args.particles,
            checkpoint=checkpoint,
            resume=args.resume,
            seed=args.seed,
            progress=not args.quiet and sys.stderr.isatty(),  # a log would fill with bars
            **options,
        )


class _Export:
    """The draws of a fit with deterministic sites, as ArviZ holds them; without, where these cannot be computed."""

    def __init__(self, result: FitResult, args: argparse.Namespace):
        self._data = self._error = None
        try:
            self._data = result.to_inference_data(
                args.num_samples,
                # Without new data for every draw: they would outweigh the draws, and not every model can make them.
                posterior_predictive=False,
                log_likelihood=True if args.log_likelihood else "auto",
            )
        except Exception as error:  # of the user's model, among others
            self._error = error
            self.draws: Mapping[str, Any] = result.sample(args.num_samples)
        else:
            group = self._data["posterior"]
            self.draws = {
                str(name): value.values.reshape(-1, *value.shape[2:])
                for name, value in group.data_vars.items()
            }

    @cached_property
    def rows(self) -> list[ParameterSummary]:
        """Mean, sd and quantiles of every number."""
        return summary(self.draws)

    @property
    def data(self) -> Any:
        """`arviz.InferenceData` or `xarray.DataTree`."""
        if self._error is not None:
            raise RuntimeError(located(self._error)) from self._error
        return self._data


# --- files ---


def _report(
    target: Target, result: FitResult, spec: GuideSpec, data: Data, args: argparse.Namespace
) -> dict[str, Any]:
    """The content of fit.json."""
    weights, refined = result.importance, result.refined
    names = ("k_hat", "ess", "efficiency", "num_samples", "log_evidence", "log_evidence_se")
    return {
        "target": target.name,
        "status": "unfinished" if result.reason == "interrupted" else "finished",
        "trusted": result.trusted,
        "reason": result.reason,
        "verdict": result.verdict,
        "advice": list(result.advice),
        "draws": _kind_of_draws(result),
        "elbo": result.elbo,
        "elbo_se": result.elbo_se,
        **{name: None if weights is None else getattr(weights, name) for name in names},
        "r_hat": None if refined is None else refined.max_r_hat,
        "ess_of_chains": None if refined is None else refined.min_ess,
        "guide": {"kind": spec.kind, "num_layers": spec.depth},
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "seconds": result.seconds,
        "seed": args.seed,
        "settings": {
            name: getattr(args, name)
            for name in ("steps", "max_steps", "lr", "particles", "num_samples", "threads")
        },
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


def _kind_of_draws(result: FitResult) -> str:
    """The kind of draws of `result.sample`: "refined" by chains, "reweighted", or those of the "guide"."""
    if result.refined is not None and result.refined.mixed:
        return "refined"
    return "reweighted" if result.importance is not None and result.importance.reliable else "guide"


def _posterior_png(result: FitResult, draws: Mapping[str, Any]) -> bytes:
    """The draws under the verdict, and the guide's own over them where these are others."""
    kind = _kind_of_draws(result)
    own = None
    if kind != "guide" and result.importance is not None:
        own = result.importance.samples
    axes = plots.posterior(draws, reference=own, labels=(kind, "guide"))
    figure = axes.flat[0].figure
    plots.write_verdict(figure, result.verdict, result.trusted)
    return png_bytes(figure)


def _loss_png(result: FitResult) -> bytes:
    figure: Any = plots.loss(result).figure
    plots.write_verdict(figure, result.verdict, result.trusted)
    return png_bytes(figure)


# --- the terminal ---


def print_fit(
    target: Target, guide: str, result: FitResult, summaries: Sequence[ParameterSummary]
) -> None:
    """A table of the parameters, beside the reference where the target has one, the verdict, and what to try next."""
    reference = target.reference or {}
    columns = ["mean", "sd", "5 %", "50 %", "95 %", *(["reference"] if reference else [])]
    rows = []
    for row in summaries[:MAX_ROWS]:
        values = (row.mean, row.sd, row.q05, row.q50, row.q95)
        cells = [row.parameter, *(rounded(value, row.sd) for value in values)]
        if reference:
            known = row.parameter in reference
            cells.append(mean_and_sd(*reference[row.parameter]) if known else "")
        rows.append(cells)
    kind = _kind_of_draws(result)
    print_table(
        f"{target.name}, {guide}, {'its own' if kind == 'guide' else kind} draws",
        "parameter",
        columns,
        rows,
    )
    if len(summaries) > MAX_ROWS:
        print(f"and {len(summaries) - MAX_ROWS} more in summary.csv")
    for line in (result.verdict, *result.advice):
        print(line)
    if result.skipped_steps:
        print(f"{result.skipped_steps} steps without a finite loss and gradient were skipped.")


def print_comparison(
    target: Target, fits: Mapping[str, FitResult], parameters: Sequence[str]
) -> None:
    """One row a guide, below the reference: mean ± sd, the verdict, k-hat, ESS, ELBO and time."""
    reference = target.reference or {}
    rows = [["reference", *(mean_and_sd(*reference[p]) for p in parameters), *5 * [""]]]
    for name, result in fits.items():
        weights = result.importance
        if result.trusted or weights is None:
            draws = result.sample(4000, raw=not result.trusted)
        else:
            draws = weights.samples
        by_name = {row.parameter: row for row in summary(draws)}
        rows.append(
            [
                name,
                *(mean_and_sd(by_name[p].mean, by_name[p].sd) for p in parameters),
                "yes" if result.trusted else "no",
                "" if weights is None else f"{weights.k_hat:.2f}",
                "" if weights is None else f"{weights.efficiency:.0%}",
                f"{result.elbo:.2f} ± {result.elbo_se:.2f}",
                f"{result.seconds:.0f} s",
            ]
        )
    print_table(
        target.name, "guide", [*parameters, "trusted", "k-hat", "ESS", "ELBO", "time"], rows
    )


def _print_levels(data: Data) -> None:
    for name, levels in getattr(data, "levels", {}).items():
        shown = ", ".join(f"{i} = {level}" for i, level in enumerate(levels[:10]))
        print(f"{name}: {shown}{', ...' if len(levels) > 10 else ''}")
