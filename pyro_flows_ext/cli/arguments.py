"""The arguments of the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from .checkpoint import GUIDES
from .density.data import SOURCES
from .density.flows import DEQUANTIZE, FLOWS
from .targets import TARGETS

EXAMPLES = """\
examples:
  pyro-flows demo
  pyro-flows fit eight-schools --guide iaf --steps 4000 --seed 0 --output results
  pyro-flows fit my_model.py:model --data my_data.csv --output results
  pyro-flows density my_data.csv --flow nsf --output density
  pyro-flows sample results --num-samples 1000
  pyro-flows --list
"""

FIT_NOTES = """\
targets:
  a built-in model (--list), or path/to/file.py:model for your own, called as model(**data). Naming a file runs it.

data:
  .json (an object of numbers and lists), .csv (a header, a vector for each column) or .npz; the names must be those
  of the model's parameters. Whole numbers stay whole.

files in the output directory:
  posterior.nc   draws, for arviz.from_netcdf       posterior.png  densities of the parameters
  summary.csv    mean, sd and quantiles             loss.png       the bound, step by step
  guide.pt       the guide, for pyro-flows sample

reading the last lines:
  k-hat below 0.7 and an ESS near the number of draws say that the guide is close to the posterior where it goes;
  the ELBO, in nats, is higher the closer it is, and compares guides of one model.

examples:
  pyro-flows fit eight-schools --guide iaf --steps 4000 --seed 0 --output results
  pyro-flows fit my_model.py:model --data my_data.json --guide planar --num-layers 8
"""

DENSITY_NOTES = """\
data:
  a set by name (--list), .csv (a header, a column for each number of a row) or .npz (rows (N, D), or images (N, H, W)
  or (N, C, H, W)). Eight tenths are trained on, one says when to stop, one is for the test; the seed decides which.

files in the output directory:
  density.pt     the density, for pyro-flows sample    samples.png  draws beside data; on the plane the density too
  density.json   settings and test log-likelihoods     loss.png     the loss, step by step, and on validation rows

reading the table:
  test log-likelihoods are in nats a row, in the units of the data; higher is better. Some flows are known by a lower
  bound only, and so is every density of whole numbers (--dequantize).

examples:
  pyro-flows density moons --flow nsf --output density
  pyro-flows density my_data.csv --flow maf --steps 4000
  pyro-flows density digits --flow glow
"""


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pyro-flows: error: {message} (see {self.prog} --help)\n")


class _ListAction(argparse.Action):
    """`--list`: prints what there is, by the titles in `const`, and ends."""

    def __init__(self, const: tuple[str, ...], **kwargs: Any):
        super().__init__(nargs=0, const=const, help=f"list the {' and the '.join(const)}", **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        for title in self.const:
            print(f"{title}:")
            for name, entry in LISTS[title].items():
                print(f"  {name:24}{entry.description}")
        parser.exit()


LISTS: dict[str, Mapping[str, Any]] = {
    "targets": TARGETS,
    "guides": GUIDES,
    "data sets": SOURCES,
    "flows": FLOWS,
}


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; `args.command` names the command. Complains in one line, and exits with 2."""
    top = _Parser(
        prog="pyro-flows",
        description="Posteriors of Pyro models, and densities of data, by normalizing flows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    _add_list(top, *LISTS)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_fit, _add_density, _add_sample, _add_demo):
        add(commands)
    return top


def _command(commands: Any, name: str, **kwargs: Any) -> argparse.ArgumentParser:
    """A new command, with what all of them take."""
    new: argparse.ArgumentParser = commands.add_parser(
        name, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )
    new.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="of all randomness (default: %(default)s)",
    )
    # One: where other programs run, two threads take up to 300 times as long as one for a small matrix.
    new.add_argument(
        "--threads",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="for tensor operations; more than 1 pays for large data only (default: %(default)s)",
    )
    new.add_argument("--debug", action="store_true", help="show where an error came from")
    return new


def _add_fit(commands: Any) -> None:
    fit = _command(
        commands,
        "fit",
        help="fit a guide to a model and write draws, a summary and pictures",
        description="Fits a guide to a model and writes draws, a summary and pictures.",
        epilog=FIT_NOTES,
    )
    fit.add_argument("target", metavar="TARGET", help="a name or path/to/file.py:model")
    fit.add_argument("--data", type=Path, metavar="FILE", help="data for the model")
    fit.add_argument(
        "--guide",
        choices=GUIDES,
        default="iaf",
        metavar="NAME",
        help=f"{', '.join(GUIDES)} (default: %(default)s)",
    )
    fit.add_argument(
        "--num-layers",
        type=_at_least(1),
        metavar="K",
        help="layers of the flow (default: 2 for iaf, 4 for sylvester and nsf, 8 for realnvp, 16 for planar and radial)",
    )
    _add_output(fit, "pyro-flows-output")
    _add_list(fit, "targets", "guides")
    _add_steps(fit, steps=2000, lr=0.02)
    _add_draws(fit)
    fit.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_density(commands: Any) -> None:
    density = _command(
        commands,
        "density",
        help="learn the density of data and write it, its test log-likelihood and pictures",
        description="Learns the density of rows of numbers, and writes it, its test log-likelihood and pictures.",
        epilog=DENSITY_NOTES,
    )
    density.add_argument("target", metavar="TARGET", help="a name, or a .csv or .npz file")
    density.add_argument("--key", metavar="NAME", help="the array of an .npz that has several")
    density.add_argument(
        "--columns", metavar="A,B,...", help="the columns of a .csv to take (default: all)"
    )
    density.add_argument(
        "--rows",
        type=_at_least(20),
        default=10_000,
        metavar="N",
        help="to draw of a set that is drawn (default: %(default)s)",
    )
    density.add_argument(
        "--flow",
        choices=FLOWS,
        default="nsf",
        metavar="NAME",
        help=f"{', '.join(FLOWS)} (default: %(default)s)",
    )
    density.add_argument(
        "--num-layers",
        type=_at_least(1),
        metavar="K",
        help="layers of the flow, or steps a level (default: by flow)",
    )
    density.add_argument(
        "--dequantize",
        choices=DEQUANTIZE,
        metavar="KIND",
        help=f"noise for whole numbers: {', '.join(DEQUANTIZE)} (default: uniform for digits, otherwise no)",
    )
    _add_output(density, "pyro-flows-density")
    _add_list(density, "data sets", "flows")
    _add_steps(density, steps=2000, lr=0.003)
    for name, default, text in (
        ("--batch-size", 256, "rows a step"),
        ("--patience", 10, "looks at the validation rows, fifty in all, without a gain to stop"),
        ("--particles", 100, "draws of a bound, for the test rows"),
    ):
        density.add_argument(
            name,
            type=_at_least(1),
            default=default,
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    density.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_sample(commands: Any) -> None:
    sample = _command(
        commands,
        "sample",
        help="draw from a guide that fit wrote, or a density that density wrote",
        description="Draws from the guide that `pyro-flows fit --output DIR` wrote, or from the density of "
        "`pyro-flows density --output DIR`.",
    )
    sample.add_argument("directory", type=Path, metavar="DIR", help="where fit or density wrote to")
    sample.add_argument(
        "--num-samples",
        type=_at_least(1),
        default=1000,
        metavar="N",
        help="draws to make (default: %(default)s)",
    )
    sample.add_argument(
        "--output", type=Path, metavar="FILE", help="a .npz file (default: DIR/draws.npz)"
    )
    sample.add_argument(
        "--target", help="the model, needed when it is in a file: path/to/file.py:model"
    )


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        help="eight schools: independent normals against a flow",
        description="Fits eight schools with independent normals and with a flow, and compares.",
    )
    _add_output(demo, "demo-output")
    _add_steps(demo, steps=1500, lr=0.02)
    _add_draws(demo)
    demo.set_defaults(quiet=False)


# --- arguments of several commands ---


def _add_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path(default),
        help="where to write (default: %(default)s)",
    )


def _add_list(parser: argparse.ArgumentParser, *titles: str) -> None:
    parser.add_argument("--list", action=_ListAction, const=titles, dest=argparse.SUPPRESS)


def _add_steps(parser: argparse.ArgumentParser, steps: int, lr: float) -> None:
    parser.add_argument(
        "--steps",
        type=_at_least(1),
        default=steps,
        metavar="N",
        help="of the optimizer (default: %(default)s)",
    )
    parser.add_argument(
        "--lr",
        type=_positive,
        default=lr,
        metavar="RATE",
        help="Adam's rate at the start (default: %(default)s)",
    )


def _add_draws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--particles",
        type=_at_least(1),
        default=64,
        metavar="N",
        help="draws a step (default: %(default)s)",
    )
    parser.add_argument(
        "--num-samples",
        type=_at_least(2),
        default=20_000,
        metavar="N",
        help="draws to summarise, weigh and write (default: %(default)s)",
    )


# --- types ---


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        return int(text)

    return parse


def _seed(text: str) -> int:
    value = _at_least(0)(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer below 2**32, got {text!r}")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value
