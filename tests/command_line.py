"""Running the command line in a test."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pyro_flows_ext.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> SimpleNamespace:
    """Exit code, stdout and stderr."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as end:  # argparse
        code = end.code
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)


def contents(directory: Path) -> dict[str, bytes]:
    """The files in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def assert_one_line(done: SimpleNamespace, code: int, message: str) -> None:
    """That a command failed with this code and one line on stderr, which matches."""
    assert done.code == code
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith("pyro-flows: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(done.err)
