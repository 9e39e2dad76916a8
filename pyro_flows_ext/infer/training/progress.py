"""Progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

# Seconds between two lines where there is no terminal.
LINE_SECONDS = 10.0


class Reported(Protocol):
    """The displayed parts of a state: its phase, its steps, and a line of numbers."""

    phase: str
    step: int

    def describe(self) -> str:
        """The numbers."""


class Progress:
    """Shows phase, steps and numbers on standard error, if `show`."""

    def __init__(self, show: bool, max_steps: int, name: str):
        self.bar: Any = None
        self.show, self.began = show, time.perf_counter()
        self.last = self.began
        if show and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=max_steps, unit="step", desc=name)

    def update(self, state: Reported) -> None:
        """Reports the state, at most every ten seconds where there is no terminal."""
        if self.bar is not None:
            self.bar.set_description(state.phase, refresh=False)
            self.bar.set_postfix_str(state.describe(), refresh=False)
            self.bar.update(state.step - self.bar.n)
        elif self.show and time.perf_counter() - self.last >= LINE_SECONDS:
            self.last = time.perf_counter()
            self._print(state)

    def phase(self, state: Reported, name: str) -> None:
        """Names what is going on now."""
        state.phase = name
        if self.bar is not None:
            self.bar.set_description(name)
        else:
            self.update(state)

    def close(self, state: Reported) -> None:
        """Ends the bar, or prints the last line."""
        if self.bar is not None:
            self.bar.close()
        elif self.show:
            self._print(state)

    def _print(self, state: Reported) -> None:
        seconds = time.perf_counter() - self.began
        parts = [f"{state.phase}: step {state.step}", f"{seconds:.0f} s", state.describe()]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)
