"""Compiled steps for a training loop that has an optimizer of its own: see `infer.fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from .arguments import Call, read_arguments
from .program import Backend
from .refusal import Refusal
from .signature import CompiledSignature
from .updates import Owner

# Whether compiling pays is seen after so many eager steps, and it does where those left would take so many seconds.
AUTO_STEPS = 6
AUTO_SECONDS = 60.0


class Timing:
    """When to compile, of `num_steps` steps: True, after the first; "auto", after some, if it pays; False, never."""

    def __init__(self, num_steps: int, when: bool | str):
        self.num_steps, self.when = num_steps, when
        self.start, self.is_over = 0.0, when is False

    def is_due(self, updates: int) -> bool:
        """Whether to compile now, after so many eager updates, the first of which makes the optimizer's state."""
        if self.is_over or updates == 0:
            return False
        if updates == 1:
            self.start = time.perf_counter()
        left = (time.perf_counter() - self.start) / (AUTO_STEPS - 1) * (self.num_steps - AUTO_STEPS)
        self.is_over = self.when is True or updates == AUTO_STEPS
        return self.is_over and (self.when is True or left >= AUTO_SECONDS)


class CompiledTraining:
    """Steps on one set of arguments, with gradients clipped to `clip_norm` together.

    `params`: the unconstrained parameters by name, of which `owner_of` tells the optimizer, after a first step of it.
    Raises `Refusal` for what does not compile.
    """

    def __init__(
        self,
        call: Call,
        params: Mapping[str, Tensor],
        owner_of: Callable[[Tensor], Owner],
        clip_norm: float,
        backend: Backend = "inductor",
    ):
        self.call = call
        _, self.arguments = read_arguments(call.args, call.kwargs)
        self.signature = CompiledSignature(
            {name: p for name, p in params.items() if p.requires_grad}, self.arguments
        )
        self._check_memory()
        self.signature.trace(call, self.arguments)
        self.program = self.signature.build(call, owner_of, self.arguments, 1, backend, clip_norm)
        self._check_memory()

    def _check_memory(self) -> None:
        if (reason := self.signature.conflict(self.arguments)) is not None:
            raise Refusal(reason)

    def step(self) -> float | None:
        """The loss before the update, or None (and no update) if it or its gradient is not finite.

        Raises `Refusal`, before anything is done, where the program no longer suits model, guide or optimizer.
        """
        self.signature.check(self.call, self.arguments)
        if not self.signature.is_current(self.program.steps_seen):
            raise Refusal("parameters, modes of modules or settings of the optimizer have changed")
        [loss] = self.program(self.arguments, self.call.loss)
        self.signature.calls += 1
        return None if math.isnan(loss) else loss
