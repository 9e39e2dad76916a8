"""Failures of a command: one line on stderr, and an exit code."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..infer.distributed import Processes
from ..programs.errors import located


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
