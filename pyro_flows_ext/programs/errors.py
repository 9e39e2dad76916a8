"""Errors of the user's program in one line, with the place in the user's code that raised them."""

from __future__ import annotations

import sysconfig
import textwrap
from pathlib import Path

import pyro
import torch

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
