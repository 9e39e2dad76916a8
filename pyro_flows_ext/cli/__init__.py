"""The command line: `pyro-flows fit`, `density`, `sample` and `demo`.

Exit codes: 0 done; 1 the fit failed; 2 bad input; 130 interrupted. What went wrong is one line on stderr, and results
of earlier runs stay as they were until a run has all of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide

from ..diagnostics import importance, save_netcdf, to_inference_data
from ..infer import fit
from .arguments import parser
from .checkpoint import GuideSpec, read_guide, rebuild_guide, save_guide
from .density import density_command, draw_from_density
from .failures import CommandError, complain, failing_with, warnings_in_one_line, writing
from .report import (
    Fitted,
    posterior_draws,
    print_comparison,
    print_fit,
    write_csv,
    write_figures,
    write_npz,
)
from .targets import TARGETS, Data, Target, load_target


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` by default) and returns its exit code."""
    args = parser().parse_args(argv)
    try:
        with warnings_in_one_line(), _threads(args.threads), pyro.get_param_store().scope():
            COMMANDS[args.command](args)
    except CommandError as error:
        if args.debug:
            raise
        return complain(f"error: {error}", error.code)
    except KeyboardInterrupt:
        return complain("interrupted; earlier results are as they were", 130)
    return 0


# --- the commands ---


def _fit_command(args: argparse.Namespace) -> None:
    with failing_with(2, ValueError, TypeError, OSError):
        target, data = load_target(args.target, args.data)
        spec = GuideSpec(args.guide, args.num_layers)
        spec.build(target.model)  # to refuse impossible options before anything else happens
    with writing(args.output) as scratch:
        fitted = _train(target, data, spec, args)
        with failing_with(1, RuntimeError, ValueError):
            save_netcdf(fitted.exported, scratch / "posterior.nc")
            write_csv(fitted, scratch / "summary.csv")
            write_figures(fitted, scratch / "posterior.png", scratch / "loss.png")
            save_guide(scratch / "guide.pt", target.name, spec, fitted.guide, data)
    if not args.quiet:
        print_fit(fitted)
        print(
            f"wrote posterior.nc, summary.csv, posterior.png, loss.png, guide.pt to {args.output}"
        )


def _sample_command(args: argparse.Namespace) -> None:
    output = args.directory / "draws.npz" if args.output is None else args.output
    with failing_with(2, ValueError, TypeError, OSError):
        if output.suffix != ".npz":
            raise ValueError(f"--output: expected a file that ends in .npz, got {str(output)!r}")
        density = args.directory / "density.pt"
        if density.exists() and (args.directory / "guide.pt").exists():
            raise ValueError(
                f"{str(args.directory)!r} holds a guide and a density: move one of guide.pt, density.pt elsewhere"
            )
    pyro.set_rng_seed(args.seed)
    (draw_from_density if density.exists() else _draw_from_guide)(args, output)
    print(f"wrote {args.num_samples} draws to {output}")


def _draw_from_guide(args: argparse.Namespace, output: Path) -> None:
    with failing_with(2, ValueError, TypeError, OSError):
        checkpoint = read_guide(args.directory / "guide.pt")
        name = checkpoint.target if args.target is None else args.target
        if args.target is None and name not in TARGETS:
            raise ValueError(
                f"{str(args.directory)!r} was fitted to {name!r}, and a file of Python is run only when you name it: "
                f"add --target {name} if you trust it"
            )
        target, _ = load_target(name, checkpoint.data)
    with failing_with(1, Exception), failing_with(2, ValueError, TypeError):
        guide = rebuild_guide(checkpoint, target.model)
        exported = _export(guide, target, checkpoint.data, args.num_samples)
    with writing(output.parent) as scratch:
        write_npz(posterior_draws(exported), scratch / output.name)


def _demo_command(args: argparse.Namespace) -> None:
    target = TARGETS["eight-schools"]
    print(
        f"{target.description}: independent normals against an inverse autoregressive flow, {args.steps} steps each"
    )
    with writing(args.output) as scratch:
        rows = {}
        for kind in ("normal", "iaf"):
            rows[kind] = fitted = _train(target, target.data(), GuideSpec(kind), args)
            write_figures(fitted, scratch / f"posterior-{kind}.png", scratch / f"loss-{kind}.png")
    print_comparison(target, rows, ("mu", "tau"))
    print(
        "mean ± sd; the reference is 10,000 draws of NUTS (posteriordb); ESS in draws of the posterior per draw"
    )
    print(f"wrote pictures to {args.output}")


COMMANDS = {
    "fit": _fit_command,
    "density": density_command,
    "sample": _sample_command,
    "demo": _demo_command,
}


def _train(target: Target, data: Data, spec: GuideSpec, args: argparse.Namespace) -> Fitted:
    """Fits a new guide, draws from it, and weighs the draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    # Settings and models that cannot be fitted are bad input; whatever else a model raises is a failure of the fit.
    with failing_with(1, Exception), failing_with(2, ValueError, TypeError):
        guide = spec.build(target.model)
        result = fit(
            target.model,
            guide,
            model_kwargs=data,
            num_steps=args.steps,
            lr=args.lr,
            num_particles=args.particles,
            seed=args.seed,
            progress=not args.quiet and sys.stderr.isatty(),  # a log would fill with bars
        )
    with failing_with(1, Exception):
        weights = importance(guide, target.model, model_kwargs=data, num_samples=args.num_samples)
        exported = _export(guide, target, data, args.num_samples)
    return Fitted(target, guide, result, weights, exported)


def _export(guide: AutoGuide, target: Target, data: Data, num_samples: int) -> Any:
    # Without new data for every draw: they would outweigh the draws in the file, and not every model can make them.
    return to_inference_data(
        guide,
        target.model,
        model_kwargs=data,
        num_samples=num_samples,
        posterior_predictive=False,
    )


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """So many threads for tensor operations inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
