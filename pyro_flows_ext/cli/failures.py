"""Failures of a command: one line on stderr, and an exit code."""

from __future__ import annotations

import signal
import sys
import sysconfig
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyro
import torch

from ..infer.distributed import Processes

# Code in these places is not the user's.
LIBRARIES = {
    str(Path(str(place)).resolve())
    for place in (
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        Path(__file__).parents[1],
        Path(torch.__file__).parent,
        Path(pyro.__file__).parent,
    )
}


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
        raise CommandError(located(error), code) from error


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Handles SIGTERM as Ctrl-C inside the block; the list that it yields then holds the signal."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield received
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def located(error: BaseException) -> str:
    """An error in one line, with the file and line of the user's code where it passed through some."""
    where = _user_line(error)
    return one_line(error) if where is None else f"{where}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """The message of an error in one line, with the kind of the error where the message alone may say too little."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {str(error.filename)!r}"
    # Pyro appends a table of shapes, which makes no sense in one line.
    message = textwrap.shorten(str(error).partition("Trace Shapes:")[0], 500, placeholder=" ...")
    is_plain = isinstance(error, ValueError | RuntimeError | FloatingPointError) and message
    return message if is_plain else f"{type(error).__name__}: {message}"


def _user_line(error: BaseException) -> str | None:
    """`file.py:12` of the innermost line of the user's code that an error, or its cause, came from."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        where = _user_line(cause)
        if where is not None:
            return where
    found, step = None, error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith("<") and not _is_library(Path(file).resolve()):
            found = f"{file}:{step.tb_lineno}"
        step = step.tb_next
    if found is None and isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    return found


def _is_library(file: Path) -> bool:
    return any(str(parent) in LIBRARIES for parent in file.parents)


def complain(message: str, code: int = 0) -> int:
    """Prints one line to stderr under the program's name, and returns the exit code."""
    print(f"pyro-flows: {message}", file=sys.stderr)
    return code


@contextmanager
def warnings_in_one_line(processes: Processes) -> Iterator[None]:
    """Shows warnings as one line each, without the line of source, in the first process."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if processes.is_first:
            complain(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
