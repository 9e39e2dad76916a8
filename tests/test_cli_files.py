"""Files of a command go to where they belong all together or not at all."""

import os
from pathlib import Path

import pytest
from command_line import contents

from pyro_flows_ext.cli.files import replaced_together


def test_files_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "mine"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def fail_at_c(source: Path, target: Path) -> None:
        if Path(target).name == "c":
            raise OSError("disk on fire")
        replace(source, target)

    def write() -> None:
        with replaced_together(tmp_path) as scratch:
            for name in ("0", "a", "b", "c"):
                (scratch / name).write_text("new")

    monkeypatch.setattr(os, "replace", fail_at_c)
    with pytest.raises(OSError, match="disk on fire"):
        write()
    assert contents(tmp_path) == {"a": b"old", "b": b"old", "mine": b"old"}
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.undo()
    write()
    assert contents(tmp_path) == {
        "0": b"new", "a": b"new", "b": b"new", "c": b"new", "mine": b"old",
    }  # fmt: skip
