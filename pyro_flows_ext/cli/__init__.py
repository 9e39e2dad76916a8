"""The command line: `pyro-flows fit`, `density`, `sample`, `score` and `demo`.

Exit codes: 0 done; 1 the work failed; 2 bad input; 3 results are written, but not every file; 130 interrupted; 143
terminated. A failure is one line on stderr, and results of earlier runs stay as they were until a run has its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch

from .arguments import parser
from .density import density_command, score_command
from .failures import CommandError, complain, terminable, warnings_in_one_line
from .fit import demo_command, fit_command
from .output import Output, output_in
from .sample import sample_command

COMMANDS: dict[str, Callable[[argparse.Namespace, Output], None]] = {
    "fit": fit_command,
    "density": density_command,
    "sample": sample_command,
    "score": score_command,
    "demo": demo_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` by default) and returns its exit code."""
    args = parser().parse_args(argv)
    output, received = None, []
    try:
        with (
            terminable() as received,
            warnings_in_one_line(),
            _threads(args.threads),
            pyro.get_param_store().scope(),
            output_in(args.output) as output,
        ):
            COMMANDS[args.command](args, output)
    except CommandError as error:
        if args.debug:
            raise
        return complain(f"error: {error}", error.code)
    except KeyboardInterrupt:
        kept = "earlier results are as they were"
        if output is not None and output.written:
            kept = f"wrote {', '.join(output.written)}"
        if received:
            return complain(f"terminated; {kept}", 143)
        return complain(f"interrupted; {kept}", 130)
    if output.complaint is not None:
        return complain(output.complaint, 3)
    return 0


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Sets the number of threads for tensor operations inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
