"""Whether compiling pays for a training run."""

from __future__ import annotations

import math
import time

# Compiling pays where, judged after AUTO_STEPS eager steps, those that are left would take AUTO_SECONDS.
AUTO_STEPS = 6
AUTO_SECONDS = 60.0


class Timing:
    """When to compile a run of `num_steps`: True, after the first; "auto", after some if it pays; False, never.

    It pays where the eager steps left would take `least` seconds.
    """

    def __init__(self, num_steps: int, when: bool | str, least: float | None = None):
        self.num_steps, self.when = num_steps, when
        self.least = AUTO_SECONDS if least is None else least
        self.last, self.fastest, self.is_over = 0.0, math.inf, when is False

    def is_due(self, updates: int) -> bool:
        """Whether to compile after this number of eager updates, the first of which makes the optimizer's state."""
        if self.is_over or updates == 0:
            return False
        now = time.perf_counter()
        if updates > 1:
            # The fastest step: others include imports and first allocations, or the work of other processes.
            self.fastest = min(self.fastest, now - self.last)
        self.last = now
        self.is_over = self.when is True or updates == AUTO_STEPS
        left = self.fastest * (self.num_steps - AUTO_STEPS)
        return self.is_over and (self.when is True or left >= self.least)
