"""The directory that a command writes to: results first, and everything else file by file."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..files import remove_unfinished, write_atomically, write_together
from ..infer.distributed import Processes
from ..programs.errors import one_line
from .failures import failing_with

# In the directory of fit and density; gone when a run is finished.
CHECKPOINT = "checkpoint.pt"


class Output:
    """Files of one run. `written`: their names; `failed`: why others could not be made.

    `is_mine`: whether this process writes, as the first of several does.
    """

    def __init__(self, directory: Path, is_mine: bool = True):
        self.directory, self.is_mine = directory, is_mine
        self.written: list[str] = []
        self.failed: dict[str, str] = {}

    def save(self, contents: Mapping[str, bytes]) -> None:
        """Writes the results that matter: all of them, or none and a `CommandError`."""
        with failing_with(1, OSError):
            write_together(self.directory, contents)
        self.written += [name for name in contents if name not in self.written]

    def add(self, name: str, make: Callable[[], bytes]) -> None:
        """Makes a file and writes it. Whatever goes wrong costs this file alone."""
        try:
            write_atomically(self.directory / name, make())
        except Exception as error:  # exporters and their libraries raise all kinds
            self.failed[name] = one_line(error)
        else:
            if name not in self.written:
                self.written.append(name)

    @property
    def complaint(self) -> str | None:
        """One line about the files that could not be written; None where all could."""
        if not self.failed:
            return None
        parts = []
        for name, reason in self.failed.items():
            earlier = name not in self.written and (self.directory / name).exists()
            parts.append(f"{name} ({reason}{'; the one there is of an earlier run' if earlier else ''})")  # fmt: skip
        return f"could not write {', '.join(parts)}; wrote {', '.join(self.written) or 'nothing'}"


@contextmanager
def output_in(directory: Path, processes: Processes) -> Iterator[Output]:
    """An `Output` in a directory, made if it is new, and removed again where nothing came of it.

    Unfinished files of killed runs are removed. A directory that cannot be written to is bad input, before any work
    is done. All of this is up to the first of several processes.
    """
    if not processes.is_first:
        yield Output(directory, is_mine=False)
        return
    with failing_with(2, OSError):
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        new = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        remove_unfinished(directory)
        with tempfile.TemporaryFile(dir=directory):
            pass
    try:
        yield Output(directory)
    finally:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Named arrays, for `numpy.load`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_bytes(figure: Any) -> bytes:
    """A figure of matplotlib as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """An object as JSON; numbers that are not finite, which JSON lacks, are null."""
    return (json.dumps(_finite(content), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
