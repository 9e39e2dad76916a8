"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_together(directory: str | Path) -> Iterator[Path]:
    """A scratch directory, whose files replace those of the same names in `directory` when the block ends well.

    When it does not (an error, Ctrl-C), `directory` is as it was before, and gone if it is new. Other files in it stay
    in any case. Raises `OSError` where nothing can be written, on entry.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
    new = [p for p in (directory, *directory.parents) if not p.exists()]
    # Inside `directory`, as renaming is atomic within one file system only.
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as scratch:
            yield Path(scratch)
            _move_all(Path(scratch), directory)
    except BaseException:
        for path in new:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def _move_all(source: Path, target: Path) -> None:
    """Moves the files of `source` into `target`; if one cannot be moved, puts those it replaced back."""
    names = sorted(path.name for path in source.iterdir())
    with tempfile.TemporaryDirectory(prefix=".earlier-", dir=source) as backup:
        earlier = [name for name in names if (target / name).exists()]
        for name in earlier:
            shutil.copy2(target / name, backup)
        try:
            for name in names:
                os.replace(source / name, target / name)
        except BaseException:
            for name in names:
                if name in earlier:
                    os.replace(Path(backup, name), target / name)
                elif not (source / name).exists():
                    (target / name).unlink(missing_ok=True)
            raise
