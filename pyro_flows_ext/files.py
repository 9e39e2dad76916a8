"""Files that appear whole or not at all, and the removal of what killed processes leave."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

PREFIX = ".unfinished-"
# Host, process and start of the process: numbers of processes come again.
_OWNER = re.compile(rf"{re.escape(PREFIX)}(?P<host>[\w.]+)-(?P<pid>\d+)-(?P<start>\d+)-")


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file; an earlier one of the same name stays as it was unless the new one is whole.

    Args:
        path: the file, in a directory that exists.
        content: all of it.

    Raises:
        OSError: where the file cannot be written, with the name of the file.
    """
    path = Path(path)
    write_together(path.parent, {path.name: content})


def write_together(directory: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Writes several files. None is replaced before all of them are on the disk.

    Args:
        directory: an existing directory.
        contents: the content of each file by name.

    Raises:
        OSError: where a file cannot be written, with its name; then all files are as they were.
    """
    directory = Path(directory)
    scratch = {name: directory / f"{PREFIX}{_this_process()}-{name}" for name in contents}
    try:
        for name, content in contents.items():
            if (directory / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _write(scratch[name], content)
        for name in contents:
            os.replace(scratch[name], directory / name)
    except OSError as error:
        # Under the name that the file would have had.
        raise OSError(error.errno, error.strerror, str(directory / name)) from error
    finally:
        for file in scratch.values():
            file.unlink(missing_ok=True)


def remove_unfinished(directory: str | os.PathLike[str]) -> None:
    """Removes what processes of this host left unfinished in a directory when they were killed."""
    for path in Path(directory).glob(f"{PREFIX}*"):
        owner = _OWNER.match(path.name)
        if owner is None or owner["host"] != _host():
            continue
        if _start(int(owner["pid"])) == int(owner["start"]):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # after a power cut, a renamed file may otherwise be empty


def _this_process() -> str:
    return f"{_host()}-{os.getpid()}-{_start(os.getpid())}"


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname()) or "localhost"


def _start(pid: int) -> int | None:
    """When a process began, in ticks since the boot; 0 where the system does not show it, None for no process."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        # The name of the program, in brackets, may hold blanks and brackets.
        return int(stat.read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # of another user
        return 0
    return 0
