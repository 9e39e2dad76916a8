import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_flows_ext.files import remove_unfinished, write_atomically, write_together


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_writes_whole_files(tmp_path: Path) -> None:
    write_together(tmp_path, {"a": b"1", "b": b""})
    write_atomically(tmp_path / "a", b"22")
    assert contents(tmp_path) == {"a": b"22", "b": b""}


def test_nothing_is_replaced_where_one_file_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"earlier")
    (tmp_path / "b").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_together(tmp_path, {"a": b"new", "b": b"new"})
    assert caught.value.filename == str(tmp_path / "b")
    assert contents(tmp_path) == {"a": b"earlier"}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .*/a'"):
        write_atomically(tmp_path / "a", b"new")
    assert contents(tmp_path) == {"a": b"earlier"}


KILLED = """
import os, signal, sys
import pyro_flows_ext.files as files
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(sys.argv[1], b"half")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".unfinished-")
    # The same process number, begun at another time; a directory; another host; a living process; a file of the user's.
    host, _, start, _ = left.name.removeprefix(".unfinished-").split("-")
    mine = f".unfinished-{host}-{os.getpid()}-"
    (tmp_path / f"{mine}1-b").write_bytes(b"")
    (tmp_path / f".unfinished-{host}-999999999-{start}-c").mkdir()
    kept = [f".unfinished-elsewhere-999999999-{start}-d", ".unfinished-business"]
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    stopped = KILLED.replace("SIGKILL", "SIGSTOP")
    with subprocess.Popen([sys.executable, "-c", stopped, str(tmp_path / "e")]) as alive:
        try:
            os.waitpid(alive.pid, os.WUNTRACED)
            remove_unfinished(tmp_path)
            names = sorted(path.name for path in tmp_path.iterdir())
        finally:
            alive.kill()
    assert len(names) == 3
    assert set(kept) < set(names)
    assert any(f"-{alive.pid}-" in name for name in names)
