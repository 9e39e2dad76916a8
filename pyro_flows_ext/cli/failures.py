"""Failures of a command: one line on stderr, and an exit code."""

from __future__ import annotations

import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import replaced_together


class CommandError(Exception):
    """A failure to report in one line, with the exit code that goes with it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextmanager
def failing_with(code: int, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into a `CommandError`."""
    try:
        yield
    except CommandError:
        raise
    except kinds as error:
        raise CommandError(_one_line(error), code) from error


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """`replaced_together`, with a directory that cannot be written to as bad input."""
    with failing_with(2, OSError), replaced_together(directory) as scratch:
        yield scratch


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {str(error.filename)!r}"
    # Pyro appends a table of shapes, which makes no sense in one line.
    message = textwrap.shorten(str(error).partition("Trace Shapes:")[0], 500, placeholder=" ...")
    is_plain = isinstance(error, ValueError | RuntimeError | FloatingPointError) and message
    return message if is_plain else f"{type(error).__name__}: {message}"


def complain(message: str, code: int = 0) -> int:
    """Prints one line to stderr under the program's name, and returns the exit code."""
    print(f"pyro-flows: {message}", file=sys.stderr)
    return code


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Shows warnings as one line each, without the line of source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        complain(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
