"""Running the command line in a test."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pyro_flows_ext.cli import main


@dataclass
class Done:
    """The exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    def failed(self, code: int, message: str) -> None:
        """Asserts this code, no output, and one line on stderr that matches."""
        assert self.code == code, self.err
        assert self.out == ""
        self.complained(message)

    def complained(self, message: str) -> None:
        """Asserts one line on stderr that matches."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("pyro-flows: ")
        with pytest.raises(ValueError, match=message):
            raise ValueError(self.err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*argv: object) -> Done:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as end:  # argparse
            code = end.code
        return Done(code, *capsys.readouterr())

    return run
