"""Arguments of one kind: the parameters that a step with them meets, its graph, and the programs made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import pyro
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..annealing import AnnealedELBO
from .arguments import Call
from .losses import check_loss
from .program import Backend, StepProgram
from .refusal import Refusal
from .tracing import LossGraph, trace_loss
from .updates import Owner, Updates
from .verify import verify

# A graph is compared with the handlers again after so many calls, and whenever their number has grown by the factor.
FIRST_CHECK, FACTOR = 8, 4


class Kind:
    """What is known about steps with arguments of one structure, after a first one by the handlers.

    `params`: the unconstrained parameters by name. `is_refused`: no graph is to be made.
    """

    def __init__(self, params: dict[str, Tensor]):
        # A parameter with several names counts once.
        self.params = {name: p for p, name in {p: name for name, p in params.items()}.items()}
        self.traced: LossGraph | None = None
        self.programs: dict[int, StepProgram] = {}
        self.training: dict[nn.Module, bool] = {}
        self.is_refused = False
        self.calls, self.next_check = 0, FIRST_CHECK

    def is_current(self, steps: int) -> bool:
        """Whether parameters, modes of modules and optimizers, after `steps` steps, are those the programs were made for."""
        store: Any = pyro.get_param_store().named_parameters()
        return (
            all(store.mapping.get(name) is p for name, p in self.params.items())
            and all(m.training is mode for m, mode in self.training.items())
            and all(p.is_current(p.steps_seen != steps) for p in self.programs.values())
        )

    def trace(self, call: Call, arguments: Sequence[Tensor]) -> None:
        """Makes the graph, and compares it with the handlers."""
        check_loss(call.loss)
        params = list(self.params.values())
        if not params:
            raise Refusal("there is no parameter to train")
        beta = params[0].new_ones(()) if isinstance(call.loss, AnnealedELBO) else None
        with _modules_called() as called:
            traced = trace_loss(call, params, arguments, beta)
        for program in (call.model, call.guide):
            called += program.modules() if isinstance(program, nn.Module) else ()
        verify(traced, call, self.params, arguments)
        self.traced, self.training = traced, {m: m.training for m in called}

    def check(self, call: Call, arguments: Sequence[Tensor]) -> None:
        """Compares the graph with the handlers again when that is due. Raises `Refusal` where they differ."""
        if self.traced is not None and self.calls == self.next_check:
            self.next_check *= FACTOR
            verify(self.traced, call, self.params, arguments, again=True)

    def build(
        self,
        call: Call,
        owner_of: Callable[[Tensor], Owner],
        arguments: Sequence[Tensor],
        num_steps: int,
        backend: Backend,
        joint_clip: float | None = None,
    ) -> StepProgram:
        """Compiles a program of `num_steps` steps, after `trace`; see `Updates` for `joint_clip`."""
        if self.traced is None:
            raise RuntimeError("build: trace first")
        reached = list(compress(self.params.values(), self.traced.reached))
        updates = Updates(reached, [owner_of(p) for p in reached], joint_clip)
        annealed = isinstance(call.loss, AnnealedELBO)
        program = StepProgram(
            self.traced, self.params, updates, arguments, annealed, num_steps, backend
        )
        self.programs[num_steps] = program
        return program


@contextmanager
def _modules_called() -> Iterator[list[nn.Module]]:
    """The modules that are called within, those that a function closes over too."""
    called: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        yield called
    finally:
        handle.remove()
