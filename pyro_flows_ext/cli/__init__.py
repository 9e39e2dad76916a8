"""The command line: `pyro-flows fit`, `density`, `sample`, `score` and `demo`.

Exit codes: 0 done; 1 the work failed; 2 bad input; 3 results are written, but not every file; 130 interrupted; 143
terminated. A failure is one line on stderr, and results of earlier runs stay as they were until a run has its own.

`fit` and `density` run on several processes under `torchrun`; the first one writes and prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch

from ..infer.distributed import Processes, find_processes
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
# Commands that train on several processes; others would do the same work in each, and write the same file.
SHARED = ("fit", "density")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (`sys.argv` by default) and returns its exit code."""
    args = parser().parse_args(argv)
    output, received = None, []
    processes = Processes()
    try:
        with (
            terminable() as received,
            _threads(args.threads),
            pyro.get_param_store().scope(),
        ):
            processes = find_processes()
            _check_command(args.command, processes)
            with warnings_in_one_line(processes), output_in(args.output, processes) as output:
                COMMANDS[args.command](args, output)
    except CommandError as error:
        if args.debug:
            raise
        # Any process may be the one that fails.
        name = "" if processes.is_first else f"{processes}: "
        return complain(f"{name}error: {error}", error.code)
    except KeyboardInterrupt:
        if not processes.is_first:
            return 143 if received else 130
        kept = "earlier results are as they were"
        if output is not None and output.written:
            kept = f"wrote {', '.join(output.written)}"
        if received:
            return complain(f"terminated; {kept}", 143)
        return complain(f"interrupted; {kept}", 130)
    if output.complaint is not None:
        return complain(output.complaint, 3)
    return 0


def _check_command(command: str, processes: Processes) -> None:
    if processes.count > 1 and command not in SHARED:
        raise CommandError(
            f"{command}: expected one process, got {processes.count}; {' and '.join(SHARED)} alone run under torchrun",
            2,
        )


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    """Sets the number of threads for tensor operations inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
