"""`CompiledSVI`: the steps of `pyro.infer.SVI`, in one compiled graph each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim
from pyro.util import warn_if_nan
from torch import Tensor

from ..particles import Program
from .arguments import Call, parameters_met, read_arguments
from .kind import Kind
from .program import Backend, StepProgram
from .refusal import Refusal
from .updates import owner_in

# So many graphs are made, each of which takes seconds to compile; for more kinds of arguments steps are eager.
MAX_GRAPHS = 8


class CompiledSVI:
    """Stochastic variational inference with loss, gradient and update in one compiled graph.

    The arguments of `pyro.infer.SVI`, the meaning of its `step` and `evaluate_loss`, and given a seed its numbers to
    rounding: parameters and optimizer states are those of the store, the modules and `optim`, written in place. The first
    step with arguments of new shapes is an eager one; then the graph is traced, compared with the handlers at other
    parameters and draws, and compiled. What does not compile runs eagerly, with one warning that says why: reading
    values off tensors, other losses and optimizers than docs/compiled.md lists, or a graph that is not the program.

    `run(num_steps)` takes up to `steps_per_call` steps at a time, in a loop that Inductor compiles on the CPU; elsewhere, and
    where the model writes into buffers, the graph repeats the step. `backend`: "inductor", any other name that dynamo knows
    ("eager" interprets the graph), or a function from a graph and inputs to a callable. Numbers, strings and objects
    among the arguments are part of the graph, and new ones make a new graph; tensors are not. What else the model reads
    must be a tensor, written in place, or stay as it is: call `retrace()` after changing anything else.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim,
        loss: ELBO,
        *,
        steps_per_call: int = 1,
        backend: Backend = "inductor",
    ):
        if not isinstance(loss, ELBO):
            raise TypeError(f"loss: expected a pyro.infer.ELBO, got a {type(loss).__name__}")
        if int(steps_per_call) != steps_per_call or steps_per_call < 1:
            raise ValueError(f"steps_per_call: expected a positive integer, got {steps_per_call!r}")
        self.model, self.guide, self.optim = model, guide, optim
        self.loss: Any = loss
        self.steps_per_call, self.backend = int(steps_per_call), backend
        self._eager = SVI(model, guide, optim, loss)
        self._kinds: dict[Hashable, Kind] = {}
        self._graphs, self._steps = 0, 0
        self._why_not: str | None = None

    @property
    def why_not(self) -> str | None:
        """Why steps run eagerly, for some arguments at least; None where none do."""
        return self._why_not

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes a step; the loss before it, in nats."""
        return self._advance(1, 1, args, kwargs)[0]

    def run(self, num_steps: int, /, *args: Any, **kwargs: Any) -> Tensor:
        """Takes `num_steps` steps, up to `steps_per_call` in one call; their losses `(num_steps)`."""
        losses: list[float] = []
        while (left := num_steps - len(losses)) > 0:
            size = min(left, self.steps_per_call)
            losses += self._advance(size, self.steps_per_call, args, kwargs)
        return torch.tensor(losses, dtype=torch.float64)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, by the handlers and without a gradient."""
        return self._eager.evaluate_loss(*args, **kwargs)  # type: ignore[no-any-return]

    def retrace(self) -> None:
        """Forgets all graphs: for when something has changed that they have as a constant."""
        self._kinds.clear()
        self._graphs, self._why_not = 0, None

    # --- one call ---

    def _advance(
        self, size: int, most: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[float]:
        """Takes `size` steps by the program of `most` steps, or one by the handlers."""
        try:
            key, arguments = read_arguments(args, kwargs)
        except Refusal as refusal:
            self._refuse(refusal)
            return [self._eager_step(args, kwargs)[0]]
        kind = self._kinds.get(key)
        if kind is not None and not (kind.is_refused or kind.is_current(self._steps)):
            kind = None
        if kind is not None and not kind.is_refused:
            try:
                call = Call(self.loss, self.model, self.guide, args, kwargs)
                program = self._program(kind, most, call, arguments)
            except Refusal as refusal:
                kind.is_refused, program = True, None
                self._refuse(refusal)
            if program is not None and program.takes(size):
                return self._compiled_steps(kind, program, arguments, size)
        loss, params = self._eager_step(args, kwargs)
        if kind is None:
            self._kinds[key] = Kind(params)
        return [loss]

    def _program(self, kind: Kind, most: int, call: Call, arguments: list[Tensor]) -> StepProgram:
        """The program of `most` steps, made or checked where that is due."""
        if kind.traced is None:
            if self._graphs == MAX_GRAPHS:
                raise Refusal(
                    f"{MAX_GRAPHS} graphs were made, for other arguments or parameters each; pass numbers that change as "
                    "tensors, and batches of few sizes"
                )
            self._graphs += 1
            kind.trace(call, arguments)
        kind.check(call, arguments)
        if most in kind.programs:
            return kind.programs[most]
        owner_of = partial(owner_in, self.optim)
        return kind.build(call, owner_of, arguments, most, self.backend)

    def _compiled_steps(
        self, kind: Kind, program: StepProgram, arguments: list[Tensor], size: int
    ) -> list[float]:
        losses = program(arguments, self.loss, size)
        kind.calls += 1
        self._steps += len(losses)
        program.steps_seen = self._steps
        for loss in filter(math.isnan, losses):
            warn_if_nan(loss, "loss")  # type: ignore[call-overload]
        return losses

    def _eager_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[float, dict[str, Tensor]]:
        """A step by the handlers, and the unconstrained parameters that it met."""
        with parameters_met() as met:
            loss = self._eager.step(*args, **kwargs)
        self._steps += 1
        return loss, {name: p for name, p in met.items() if p.requires_grad}

    def _refuse(self, refusal: Refusal) -> None:
        """Warns of steps that are not compiled, once."""
        if self._why_not is None:
            self._why_not = str(refusal)
            warnings.warn(f"CompiledSVI takes eager steps: {refusal}", stacklevel=4)
