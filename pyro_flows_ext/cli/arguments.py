"""The arguments of the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from .checkpoint import GUIDES
from .targets import TARGETS

EXAMPLES = """\
examples:
  pyro-flows demo
  pyro-flows fit eight-schools --guide sylvester --steps 4000 --seed 0 --output results
  pyro-flows fit my_model.py:model --data my_data.csv --output results
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
  pyro-flows fit eight-schools --guide sylvester --steps 4000 --seed 0 --output results
  pyro-flows fit my_model.py:model --data my_data.json --guide planar --num-transforms 8
"""


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pyro-flows: error: {message} (see {self.prog} --help)\n")


class _ListAction(argparse.Action):
    """`--list`: prints targets and guides, and ends."""

    def __init__(self, **kwargs: Any):
        super().__init__(nargs=0, help="list the built-in targets and the guides", **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        for title, entries in (("targets", TARGETS), ("guides", GUIDES)):
            print(f"{title}:")
            for name, entry in entries.items():
                print(f"  {name:24}{entry.description}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; `args.command` names the command. Complains in one line, and exits with 2."""
    top = _Parser(
        prog="pyro-flows",
        description="Posteriors of Pyro models by normalizing flows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("--list", action=_ListAction, dest=argparse.SUPPRESS)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, **kwargs: Any) -> argparse.ArgumentParser:
        new = commands.add_parser(
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

    fit_parser = command(
        "fit",
        help="fit a guide to a model and write draws, a summary and pictures",
        description="Fits a guide to a model and writes draws, a summary and pictures.",
        epilog=FIT_NOTES,
    )
    fit_parser.add_argument("target", metavar="TARGET", help="a name or path/to/file.py:model")
    fit_parser.add_argument("--data", type=Path, metavar="FILE", help="data for the model")
    fit_parser.add_argument(
        "--guide",
        choices=GUIDES,
        default="sylvester",
        metavar="NAME",
        help=f"{', '.join(GUIDES)} (default: %(default)s)",
    )
    fit_parser.add_argument(
        "--num-transforms",
        type=_at_least(1),
        metavar="K",
        help="layers of the flow (default: 4 for sylvester, 16 for planar and radial)",
    )
    fit_parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("pyro-flows-output"),
        help="where to write (default: %(default)s)",
    )
    fit_parser.add_argument("--list", action=_ListAction, dest=argparse.SUPPRESS)
    _add_training(fit_parser, steps=2000)
    fit_parser.add_argument("--quiet", action="store_true", help="print nothing but errors")

    sample_parser = command(
        "sample",
        help="draw from a guide that fit wrote",
        description="Draws from the guide that `pyro-flows fit --output DIR` wrote.",
    )
    sample_parser.add_argument("directory", type=Path, metavar="DIR", help="where fit wrote to")
    sample_parser.add_argument(
        "--num-samples",
        type=_at_least(1),
        default=1000,
        metavar="N",
        help="draws to make (default: %(default)s)",
    )
    sample_parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a .npz file (default: DIR/draws.npz)"
    )
    sample_parser.add_argument(
        "--target", help="the model, needed when it is in a file: path/to/file.py:model"
    )

    demo_parser = command(
        "demo",
        help="eight schools: independent normals against a flow",
        description="Fits eight schools with independent normals and with a flow, and compares.",
    )
    demo_parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("demo-output"),
        help="where to write (default: %(default)s)",
    )
    _add_training(demo_parser, steps=1500)
    demo_parser.set_defaults(quiet=False)
    return top


def _add_training(parser: argparse.ArgumentParser, steps: int) -> None:
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
        default=0.02,
        metavar="RATE",
        help="Adam's rate at the start (default: %(default)s)",
    )
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
