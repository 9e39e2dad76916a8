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

from ...programs import Program
from .arguments import Call, parameters_met, read_arguments
from .program import Backend, StepProgram
from .refusal import Refusal
from .signature import CompiledSignature
from .updates import owner_in

# So many graphs are made, each of which takes seconds to compile; for more kinds of arguments steps are eager.
MAX_GRAPHS = 8


class _Conflict(Refusal):
    """A refusal of these arguments, and not of others with the same signature."""


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
        self._signatures: dict[Hashable, list[CompiledSignature]] = {}
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
        self._signatures.clear()
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
        known = self._signatures.setdefault(key, [])
        signature = next(
            (s for s in known if s.suits(arguments) and s.is_current(self._steps)), None
        )
        if signature is None:
            signature = self._with_other_aliases(known, arguments)
        if signature is not None and not signature.is_refused:
            program = self._program_for(signature, most, args, kwargs, arguments)
            if program is not None and program.takes(size):
                return self._compiled_steps(signature, program, arguments, size)
        loss, params = self._eager_step(args, kwargs)
        if signature is None:
            # Graphs of parameters that are no more will not be used again.
            known[:] = [s for s in known if s.is_alive()]
            known.append(CompiledSignature(params, arguments))
        return [loss]

    def _with_other_aliases(
        self, known: list[CompiledSignature], arguments: list[Tensor]
    ) -> CompiledSignature | None:
        """A new signature for arguments that differ from earlier ones in their aliases only: parameters are there."""
        for earlier in known:
            if earlier.is_current(self._steps) and not earlier.suits(arguments):
                known.append(CompiledSignature(earlier.params, arguments))
                return known[-1]
        return None

    def _program_for(
        self,
        signature: CompiledSignature,
        most: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arguments: list[Tensor],
    ) -> StepProgram | None:
        """The program of `most` steps, or None, with a warning, where the steps have to be eager."""
        try:
            call = Call(self.loss, self.model, self.guide, args, kwargs)
            if (reason := signature.conflict(arguments)) is not None:
                raise _Conflict(reason)
            program = self._program(signature, most, call, arguments)
            if (reason := signature.conflict(arguments)) is not None:
                raise _Conflict(reason)
            return program
        except Refusal as refusal:
            signature.is_refused = not isinstance(refusal, _Conflict)
            self._refuse(refusal)
            return None

    def _program(
        self, signature: CompiledSignature, most: int, call: Call, arguments: list[Tensor]
    ) -> StepProgram:
        """The program of `most` steps, made or checked where that is due."""
        if signature.traced is None:
            if self._graphs == MAX_GRAPHS:
                raise Refusal(
                    f"{MAX_GRAPHS} graphs were made, for other arguments or parameters each; pass numbers that change as "
                    "tensors, and batches of few sizes"
                )
            self._graphs += 1
            signature.trace(call, arguments)
        signature.check(call, arguments)
        if most in signature.programs:
            return signature.programs[most]
        owner_of = partial(owner_in, self.optim)
        return signature.build(call, owner_of, arguments, most, self.backend)

    def _compiled_steps(
        self, signature: CompiledSignature, program: StepProgram, arguments: list[Tensor], size: int
    ) -> list[float]:
        losses = program(arguments, self.loss, size)
        signature.calls += 1
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
