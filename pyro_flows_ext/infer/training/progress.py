"""Progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from .rounds import TrainingState

# Seconds between two lines where there is no terminal.
LINE_SECONDS = 10.0


class Progress:
    """Shows phase, steps, bound and effective sample size on standard error, if `show`."""

    def __init__(self, show: bool, max_steps: int):
        self.bar: Any = None
        self.show, self.began = show, time.perf_counter()
        self.last = self.began
        if show and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(total=max_steps, unit="step", desc="fit")

    def update(self, state: TrainingState) -> None:
        """Reports the state, at most every ten seconds where there is no terminal."""
        if self.bar is not None:
            self.bar.set_description(state.phase, refresh=False)
            self.bar.set_postfix_str(self._numbers(state), refresh=False)
            self.bar.update(state.step - self.bar.n)
        elif self.show and time.perf_counter() - self.last >= LINE_SECONDS:
            self.last = time.perf_counter()
            self._print(state)

    def phase(self, state: TrainingState, name: str) -> None:
        """Names what is going on now."""
        state.phase = name
        if self.bar is not None:
            self.bar.set_description(name)
        else:
            self.update(state)

    def close(self, state: TrainingState) -> None:
        """Ends the bar, or prints the last line."""
        if self.bar is not None:
            self.bar.close()
        elif self.show:
            self._print(state)

    def _print(self, state: TrainingState) -> None:
        seconds = time.perf_counter() - self.began
        line = f"{state.phase}: step {state.step}, {seconds:.0f} s, {self._numbers(state)}"
        print(line, file=sys.stderr, flush=True)

    def _numbers(self, state: TrainingState) -> str:
        numbers = f"ELBO {-state.loss:.2f}"
        if state.importance is not None:
            numbers += f", ESS {state.importance.efficiency:.0%}"
        return numbers
