"""The arguments of the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..datasets import DATASETS
from ..flows import FLOWS
from ..results import GUIDES
from ..testing.targets import TARGETS

DEQUANTIZE = ("no", "uniform", "variational")

EXAMPLES = """\
examples:
  pyro-flows demo
  pyro-flows fit eight-schools --guide iaf --seed 0 --output results
  pyro-flows fit my_model.py:model --data my_data.csv --output results
  pyro-flows density my_data.csv --flow nsf --output density
  pyro-flows density my_data.csv --columns price --context size,rooms --output density
  pyro-flows sample results --num-samples 1000
  pyro-flows score density new_rows.csv
  pyro-flows --list

exit codes:
  0 done, 1 the work failed, 2 bad input, 3 results are written but not every file, 130 interrupted, 143 terminated
"""

FIT_NOTES = """\
targets:
  a built-in model (--list), or path/to/file.py:model for your own, called as model(**data). Naming a file runs it.

data:
  .json (an object of numbers and lists), .csv (a header, a vector for each column), .parquet or .npz; the names must
  be those of the model's parameters (--columns takes some). Whole numbers stay whole where the model runs with them. A column of strings becomes a
  factor, 0, 1, ... in alphabetical order. Missing entries are NaN, which the model has to mask.

files in the output directory, the first two before all others:
  guide.pt       the guide, for pyro-flows sample    posterior.nc   draws, for arviz.from_netcdf
  fit.json       verdict, k-hat, ESS, ELBO, ...      posterior.png  densities of the parameters
  summary.csv    mean, sd and quantiles              loss.png       the bound, step by step
  Of these, posterior.nc contains your data (the group observed_data); guide.pt and fit.json contain the path of the
  data file and a checksum. Ctrl-C and SIGTERM keep what there is so far, marked as unfinished in fit.json.

reading the last lines:
  a fit ends as trusted when the weights of the guide's draws are even (k-hat below 0.7, ESS above half of the draws)
  and chains that start from these draws do not drift, or mix, and then their draws are the ones written. Otherwise
  the lines say why not, and what to try next. The ELBO, in nats, compares guides of one model: higher is closer.

examples:
  pyro-flows fit eight-schools --guide iaf --seed 0 --output results
  pyro-flows fit my_model.py:model --data my_data.json --guide planar --num-layers 8
"""

DENSITY_NOTES = """\
data:
  a set by name (--list), .csv or .parquet (a column for each number of a row), or .npz (rows (N, D), or images
  (N, H, W) or (N, C, H, W)). With --context the density is one of the other columns given these. Eight tenths are trained on, one decides when to stop, one is for the test; the seed draws them.

files in the output directory, the first two before all others:
  density.pt     the density, for pyro-flows sample    samples.png  draws beside data; on the plane the density too
  density.json   settings and test log-likelihoods     loss.png     the loss, step by step, and on validation rows
  calibration.png  ranks of test rows among draws, column by column: even where the density is right
  Of these, samples.png shows rows of your data; density.pt contains the mean and the scale of each column.
  Ctrl-C and SIGTERM keep what there is so far, marked as unfinished in density.json.

reading the table:
  test log-likelihoods are in nats a row, in the units of the data; higher is better. Some flows are known by a lower
  bound only, and so is every density of whole numbers (--dequantize).

examples:
  pyro-flows density moons --flow nsf --output density
  pyro-flows density my_data.csv --flow maf --steps 4000
  pyro-flows density digits --flow glow
"""

LISTS: dict[str, Mapping[str, Any]] = {
    "targets": TARGETS,
    "guides": GUIDES,
    "data sets": DATASETS,
    "flows": FLOWS,
}


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pyro-flows: error: {message} (see {self.prog} --help)\n")

    def option(self, name: str, text: str, default: Any = None, **kwargs: Any) -> None:
        """An option with a value, whose help ends in its default."""
        kwargs.setdefault("metavar", "N")
        ending = "" if default is None else " (default: %(default)s)"
        self.add_argument(name, default=default, help=f"{text}{ending}", **kwargs)

    def list_of(self, *titles: str) -> None:
        """`--list`."""
        self.add_argument("--list", action=_ListAction, const=titles, dest=argparse.SUPPRESS)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; of `sample`, the name of the file and its directory apart."""
        found = super().parse_args(args, namespace)
        if found.command in ("sample", "score"):
            home = found.directory if found.directory.suffix != ".pt" else found.directory.parent
            default, suffixes = found.default_file, found.suffixes
            file = home / default if found.output is None else found.output
            if file.suffix not in suffixes:
                self.error(
                    f"--output: expected a file that ends in {' or '.join(suffixes)}, got {str(file)!r}"
                )
            found.output, found.file, found.suffix = file.parent, file.name, file.suffix
        return found


class _ListAction(argparse.Action):
    """`--list`: prints the entries by the titles in `const`, and ends."""

    def __init__(self, const: tuple[str, ...], **kwargs: Any):
        super().__init__(nargs=0, const=const, help=f"list the {' and the '.join(const)}", **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        for title in self.const:
            print(f"{title}:")
            for name, entry in LISTS[title].items():
                print(f"  {name:24}{entry.description}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; `args.command` names the command. Complains in one line, and exits with 2."""
    top = _Parser(
        prog="pyro-flows",
        description="Posteriors of Pyro models, and densities of data, by normalizing flows.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=__version__)
    top.list_of(*LISTS)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_add_fit, _add_density, _add_sample, _add_score, _add_demo):
        add(commands)
    return top


def _command(commands: Any, name: str, description: str, epilog: str | None = None) -> _Parser:
    """A new command, with the options of all commands."""
    new: _Parser = commands.add_parser(
        name,
        help=description[0].lower() + description[1:].rstrip("."),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.option("--seed", "of all randomness", 0, type=_seed)
    # One: where other programs run, two threads take up to 300 times as long as one for a small matrix.
    text = "for tensor operations; more than 1 pays for large data only"
    new.option("--threads", text, 1, type=_at_least(1))
    new.add_argument("--debug", action="store_true", help="show where an error came from")
    return new


def _add_fit(commands: Any) -> None:
    about = "Fit a guide to a model and write it, draws, a summary and pictures."
    fit = _command(commands, "fit", about, FIT_NOTES)
    fit.add_argument("target", metavar="TARGET", help="a name or path/to/file.py:model")
    fit.option("--data", "data for the model", type=Path, metavar="FILE")
    fit.option("--columns", "those of the data to take (default: all)", **_NAMES)
    _add_kind(fit, "--guide", GUIDES, "iaf")
    fit.option("--num-layers", "layers of the flow (default: by guide)", type=_at_least(1))
    fit.list_of("targets", "guides")
    _add_training(fit, "pyro-flows-output", steps=None, lr=0.02)
    _add_rounds(fit)
    _add_checkpoint(fit)
    text = "write the log likelihood of every draw and row even where it is more than 10^7 numbers"
    fit.add_argument("--log-likelihood", action="store_true", help=text)
    fit.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_density(commands: Any) -> None:
    about = (
        "Learn the density of rows of numbers and write it, its test log-likelihood and pictures."
    )
    density = _command(commands, "density", about, DENSITY_NOTES)
    density.add_argument(
        "target", metavar="TARGET", help="a name, or a .csv, .parquet or .npz file"
    )
    density.option("--key", "the array of an .npz that has several", metavar="NAME")
    density.option("--columns", "the columns of a table to learn (default: all others)", **_NAMES)
    density.option(
        "--context", "the columns of a table that they depend on (default: none)", **_NAMES
    )
    density.option("--rows", "to draw of a set that is drawn", 10_000, type=_at_least(20))
    _add_kind(density, "--flow", FLOWS, "nsf")
    text = "layers of the flow, or steps a level (default: by flow)"
    density.option("--num-layers", text, type=_at_least(1))
    text = f"noise for whole numbers: {', '.join(DEQUANTIZE)} (default: uniform for digits, otherwise no)"
    density.option("--dequantize", text, choices=DEQUANTIZE, metavar="KIND")
    density.list_of("data sets", "flows")
    _add_training(density, "pyro-flows-density", steps=2000, lr=0.003)
    density.option("--batch-size", "rows a step", 256, type=_at_least(1))
    text = "evaluations of the validation rows, fifty in all, without a gain to stop"
    density.option("--patience", text, 10, type=_at_least(1))
    density.option("--particles", "draws of a bound, for the test rows", 100, type=_at_least(1))
    _add_checkpoint(density)
    density.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_sample(commands: Any) -> None:
    about = "Draw from a guide that fit wrote, or a density that density wrote."
    sample = _command(commands, "sample", about)
    text = "the output directory of fit or density, or the guide.pt or density.pt in it"
    sample.add_argument("directory", type=Path, metavar="DIR", help=text)
    sample.option("--num-samples", "draws to make", 1000, type=_at_least(1))
    text = "a .npz, .csv or .parquet file (default: DIR/draws.npz)"
    sample.option("--output", text, type=Path, metavar="FILE")
    sample.set_defaults(default_file="draws.npz", suffixes=(".npz", ".csv", ".parquet"))
    text = "of a density with a context: a table of contexts, for each of which the draws are made"
    sample.option("--context", text, metavar="FILE")
    text = "the model, needed when it is in a file: path/to/file.py:model"
    sample.option("--target", text, metavar="TARGET")
    text = "the data of the fit, needed when their file is no longer where it was"
    sample.option("--data", text, type=Path, metavar="FILE")
    sample.option("--columns", "the columns that the fit took of the data (default: all)", **_NAMES)


def _add_score(commands: Any) -> None:
    about = "Score the rows of a file by a density that density wrote: log densities in nats."
    score = _command(commands, "score", about)
    text = "the output directory of density, or the density.pt in it"
    score.add_argument("directory", type=Path, metavar="DIR", help=text)
    text = "a .csv or .parquet with the columns of the density and its context, or an .npz"
    score.add_argument("data", metavar="FILE", help=text)
    score.option("--key", "the array of an .npz that has several", metavar="NAME")
    score.option("--particles", "draws of a bound", 100, type=_at_least(1))
    text = "a .csv or .parquet file (default: DIR/scores.csv)"
    score.option("--output", text, type=Path, metavar="FILE")
    score.set_defaults(default_file="scores.csv", suffixes=(".csv", ".parquet"))


def _add_demo(commands: Any) -> None:
    demo = _command(commands, "demo", "Compare independent normals with a flow on eight schools.")
    _add_training(demo, "demo-output", steps=None, lr=0.02)
    _add_rounds(demo)
    demo.set_defaults(quiet=False, log_likelihood=False, checkpoint=False, resume=False)


# --- arguments of several commands ---


def _add_kind(parser: _Parser, name: str, kinds: Mapping[str, Any], default: str) -> None:
    parser.option(name, ", ".join(kinds), default, choices=kinds, metavar="NAME")


def _add_checkpoint(parser: _Parser) -> None:
    text = "write a checkpoint every few seconds, so that --resume can go on after a crash"
    parser.add_argument("--checkpoint", action="store_true", help=text)
    text = "go on from the checkpoint of an unfinished run with the same options, and write one"
    parser.add_argument("--resume", action="store_true", help=text)


def _add_training(parser: _Parser, output: str, steps: int | None, lr: float) -> None:
    parser.option("--output", "where to write", Path(output), type=Path, metavar="DIR")
    text = (
        "of the optimizer"
        if steps
        else "a fixed number of steps, without a verdict (default: until trusted)"
    )
    parser.option("--steps", text, steps, type=_at_least(1))
    parser.option("--lr", "Adam's rate at the start", lr, type=_positive, metavar="RATE")


def _add_rounds(parser: _Parser) -> None:
    parser.option("--max-steps", "the most steps of the optimizer", 5000, type=_at_least(1))
    text = "draws a step (default: 64, fewer where they are slow)"
    parser.option("--particles", text, type=_at_least(1))
    text = "draws to summarise and write, of guides; chains have as many as they ran"
    parser.option("--num-samples", text, 10_000, type=_at_least(2))


# --- types ---


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {least}, got {text!r}"
            )
        return int(text)

    return parse


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"expected different names with commas between, got {text!r}"
        )
    return names


_NAMES: dict[str, Any] = {"type": _names, "metavar": "A,B,..."}


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
