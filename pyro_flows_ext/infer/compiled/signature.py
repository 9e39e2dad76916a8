"""Calls that one graph suits: their arguments, the parameters they meet, and the programs made of the graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import pyro
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..elbo import AnnealedELBO
from .arguments import Call, aliases, state_of, storages
from .guards import StateGuard
from .losses import check_loss
from .program import Backend, StepProgram
from .refusal import Refusal
from .tracing import LossGraph, trace_loss
from .updates import Owner, Updates
from .verify import verify

# A graph is compared with the handlers again after so many calls, and whenever their number has grown by the factor.
FIRST_CHECK, FACTOR = 8, 4


class CompiledSignature:
    """Calls whose arguments have one structure and one pattern of aliases, after a first one by the handlers.

    `params`: the unconstrained parameters by name. `arguments`: the tensors of a first call. `is_refused`: no graph is to
    be made.
    """

    def __init__(self, params: dict[str, Tensor], arguments: Sequence[Tensor]):
        # A parameter with several names counts once.
        self.params = {name: p for p, name in {p: name for name, p in params.items()}.items()}
        self.traced: LossGraph | None = None
        self.programs: dict[int, StepProgram] = {}
        self.guard = StateGuard(())
        self.is_refused = False
        self.calls, self.next_check = 0, FIRST_CHECK
        self._reserved = storages(list(self.params.values()))  # memory that a step writes to
        self._closed_over: list[Tensor] = []
        self._addresses: set[int] = set()
        self._aliases = self._aliases_of(arguments)

    # --- whether it suits a call ---

    def is_alive(self) -> bool:
        """Whether the parameters are still those of the store."""
        store: Any = pyro.get_param_store().named_parameters()
        return all(store.mapping.get(name) is p for name, p in self.params.items())

    def is_current(self, steps: int) -> bool:
        """Whether parameters, closed-over state and optimizers are, after `steps` steps, those the programs were made for."""
        return (
            self.is_alive()
            and self.guard.holds()
            and all(p.is_current(p.steps_seen != steps) for p in self.programs.values())
        )

    def suits(self, arguments: Sequence[Tensor]) -> bool:
        """Whether arguments are aliases of each other, and of tensors that the program closes over, as in the first call."""
        return self._aliases_of(arguments) == self._aliases

    def _aliases_of(self, arguments: Sequence[Tensor]) -> Hashable:
        if any(t.data_ptr() in self._addresses for t in arguments):
            return aliases(arguments, self._closed_over)
        return aliases(arguments) if len(arguments) > 1 else None

    def conflict(self, arguments: Sequence[Tensor]) -> str | None:
        """Why steps must be eager with these arguments: memory that is written to is that of an argument too."""
        if not self._reserved.isdisjoint(storages(arguments)):
            return "an argument shares its memory with a parameter, or with a buffer that the program writes into"
        for i in self.traced.written_arguments if self.traced is not None else ():
            rest = [*arguments[:i], *arguments[i + 1 :], *self._closed_over]
            if not storages(rest).isdisjoint(storages([arguments[i]])):
                return (
                    "the program writes into an argument that shares its memory with another tensor"
                )
        return None

    # --- graph and programs ---

    def trace(self, call: Call, arguments: Sequence[Tensor]) -> None:
        """Makes the graph, and compares it with the handlers."""
        check_loss(call.loss)
        params = list(self.params.values())
        if not params:
            raise Refusal("there is no parameter to train")
        beta = params[0].new_ones(()) if isinstance(call.loss, AnnealedELBO) else None
        with _modules_called() as called:
            traced = trace_loss(call, params, arguments, beta)
        guard = StateGuard([*state_of(call), *called])
        verify(traced, call, self.params, arguments)
        guard.settle([*params, *traced.others])
        self.traced, self.guard = traced, guard
        self._closed_over = traced.others
        self._addresses = {t.data_ptr() for t in traced.others if t.numel()}
        self._aliases = self._aliases_of(arguments)
        self._reserved |= storages([traced.others[i] for i in traced.written_others])

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
        self._reserved |= storages(updates.tensors)
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
