"""The command line: `pyro-flows fit`, `sample` and `demo`.

Exit codes: 0 done; 1 the fit failed; 2 bad input; 130 interrupted. What went wrong is one line on stderr, and results
of earlier runs stay as they were until a run has all of its own.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
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
from .files import replaced_together
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


class CommandError(Exception):
    """A failure to report in one line, with the exit code that goes with it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` by default) and returns its exit code."""
    args = parser().parse_args(argv)
    try:
        with _warnings_in_one_line(), _threads(args.threads), pyro.get_param_store().scope():
            COMMANDS[args.command](args)
    except CommandError as error:
        if args.debug:
            raise
        return _complain(f"error: {error}", error.code)
    except KeyboardInterrupt:
        return _complain("interrupted; earlier results are as they were", 130)
    return 0


# --- the commands ---


def _fit_command(args: argparse.Namespace) -> None:
    with _failing_with(2, ValueError, TypeError, OSError):
        target, data = load_target(args.target, args.data)
        spec = GuideSpec(args.guide, args.num_transforms)
        spec.build(target.model)  # to refuse impossible options before anything else happens
    with _writing(args.output) as scratch:
        fitted = _train(target, data, spec, args)
        with _failing_with(1, RuntimeError, ValueError):
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
    with _failing_with(2, ValueError, TypeError, OSError):
        if output.suffix != ".npz":
            raise ValueError(f"--output: expected a file that ends in .npz, got {str(output)!r}")
        checkpoint = read_guide(args.directory / "guide.pt")
        name = checkpoint.target if args.target is None else args.target
        if args.target is None and name not in TARGETS:
            raise ValueError(
                f"{str(args.directory)!r} was fitted to {name!r}, and a file of Python is run only when you name it: "
                f"add --target {name} if you trust it"
            )
        target, _ = load_target(name, checkpoint.data)
    pyro.set_rng_seed(args.seed)
    with _failing_with(1, Exception), _failing_with(2, ValueError, TypeError):
        guide = rebuild_guide(checkpoint, target.model)
        exported = _export(guide, target, checkpoint.data, args.num_samples)
    with _writing(output.parent) as scratch:
        write_npz(posterior_draws(exported), scratch / output.name)
    print(f"wrote {args.num_samples} draws to {output}")


def _demo_command(args: argparse.Namespace) -> None:
    target = TARGETS["eight-schools"]
    print(
        f"{target.description}: independent normals against a Sylvester flow, {args.steps} steps each"
    )
    with _writing(args.output) as scratch:
        rows = {}
        for kind in ("normal", "sylvester"):
            rows[kind] = fitted = _train(target, target.data(), GuideSpec(kind), args)
            write_figures(fitted, scratch / f"posterior-{kind}.png", scratch / f"loss-{kind}.png")
    print_comparison(target, rows, ("mu", "tau"))
    print(
        "mean ± sd; the reference is 10,000 draws of NUTS (posteriordb); ESS in draws of the posterior per draw"
    )
    print(f"wrote pictures to {args.output}")


COMMANDS = {"fit": _fit_command, "sample": _sample_command, "demo": _demo_command}


def _train(target: Target, data: Data, spec: GuideSpec, args: argparse.Namespace) -> Fitted:
    """Fits a new guide, draws from it, and weighs the draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    # Settings and models that cannot be fitted are bad input; whatever else a model raises is a failure of the fit.
    with _failing_with(1, Exception), _failing_with(2, ValueError, TypeError):
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
    with _failing_with(1, Exception):
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


# --- failures ---


@contextmanager
def _failing_with(code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into a `CommandError`."""
    try:
        yield
    except CommandError:
        raise
    except kinds as error:
        raise CommandError(_one_line(error), code) from error


@contextmanager
def _writing(directory: Path) -> Iterator[Path]:
    """`replaced_together`, with a directory that cannot be written to as bad input."""
    with _failing_with(2, OSError), replaced_together(directory) as scratch:
        yield scratch


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {str(error.filename)!r}"
    # Pyro appends a table of shapes, which makes no sense in one line.
    message = textwrap.shorten(str(error).partition("Trace Shapes:")[0], 500, placeholder=" ...")
    is_plain = isinstance(error, ValueError | RuntimeError | FloatingPointError) and message
    return message if is_plain else f"{type(error).__name__}: {message}"


def _complain(message: str, code: int = 0) -> int:
    print(f"pyro-flows: {message}", file=sys.stderr)
    return code


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _complain(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
