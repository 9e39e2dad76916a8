"""Compiled training steps: `CompiledSVI` for users, `CompiledTraining` for loops with an optimizer of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim
from pyro.util import warn_if_nan
from torch import Tensor

from ...programs import Program, SparseSubsample, recorded_parameters
from ..distributed import count_processes
from .call import Call, read_arguments
from .program import Backend, StepProgram
from .signature import CompiledSignature
from .unsupported import UnsupportedForCompilation, failures_unsupported
from .updates import owner_of

# Each graph takes seconds to compile. With this number of them, steps of further signatures are eager.
MAX_GRAPHS = 8


class CompiledSVI:
    """Stochastic variational inference with loss, gradient and update in one compiled graph.

    Arguments, `step` and `evaluate_loss` are those of `pyro.infer.SVI`. Given a seed, the losses are the same to rounding.
    Parameters and optimizer states are written in place. The first step with new arguments is eager. The second traces
    the graph, compares it with Pyro's handlers at other parameters, draws and data, and compiles it. Programs that cannot
    be compiled run eagerly, with one warning; `fallback_reason` has the reason.

    Tensors among the arguments are inputs of the graph; numbers, strings and objects are constants. Another value, another
    shape, another pattern of aliases among the tensors, or a change of closed-over state makes another graph. See
    docs/compiled.md for losses, optimizers, and for changes that are not detected: call `retrace()` after those.

    Args:
        model, guide, optim, loss: as for `pyro.infer.SVI`.
        steps_per_call: the most steps that one call of the graph takes in `run`.
        backend: "inductor", another backend of torch.compile ("eager" interprets the graph), or a function from a graph
            and its inputs to a callable.

    Raises:
        TypeError: if `loss` is not a Pyro ELBO.
        ValueError: if `steps_per_call` is not a positive integer.
        RuntimeError: on several processes, started by `torchrun`.

    Example:
        >>> svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())  # doctest: +SKIP
        >>> losses = svi.run(1000, x, y)  # doctest: +SKIP
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
        if (num := count_processes()) > 1:
            # The update is part of the graph, so that every process would train on by itself.
            raise RuntimeError(
                f"CompiledSVI: expected one process, got {num}; fit(model, guide, ..., num_steps=...) averages gradients "
                "over processes. Start independent runs without torchrun"
            )
        self.model, self.guide, self.optim = model, guide, optim
        self.loss: Any = loss
        self.steps_per_call, self.backend = int(steps_per_call), backend
        self._eager = SVI(model, guide, optim, loss)
        self._signatures: dict[Hashable, list[CompiledSignature]] = {}
        self._graphs, self._steps = 0, 0
        self._fallback_reason: str | None = None

    @property
    def fallback_reason(self) -> str | None:
        """The reason for eager steps, with some arguments at least; None if all steps run compiled."""
        return self._fallback_reason

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes a step; returns the loss before it, in nats."""
        return self._advance(1, 1, args, kwargs)[0]

    def run(self, num_steps: int, /, *args: Any, **kwargs: Any) -> Tensor:
        """Takes `num_steps` steps, up to `steps_per_call` in one call; returns their losses `(num_steps,)`."""
        losses: list[float] = []
        while (left := num_steps - len(losses)) > 0:
            size = min(left, self.steps_per_call)
            losses += self._advance(size, self.steps_per_call, args, kwargs)
        return torch.tensor(losses, dtype=torch.float64)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss, computed eagerly and without a gradient."""
        return self._eager.evaluate_loss(*args, **kwargs)

    def retrace(self) -> None:
        """Discards all graphs: for changes of constants that are not detected."""
        self._signatures.clear()
        self._graphs, self._fallback_reason = 0, None

    # --- one call ---

    def _advance(
        self, size: int, most: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[float]:
        """Takes `size` steps by the program of `most` steps, or one eager step."""
        try:
            with failures_unsupported():
                key, arguments = read_arguments(args, kwargs)
        except UnsupportedForCompilation as unsupported:
            self._fall_back(unsupported)
            return [self._eager_step(args, kwargs)[0]]
        known = self._signatures.setdefault(key, [])
        signature = next(
            (s for s in known if s.suits(arguments) and s.is_current(self._steps)), None
        )
        if signature is None:
            signature = self._with_other_aliases(known, arguments)
        if signature is not None and not signature.is_unsupported:
            call = Call(self.loss, self.model, self.guide, args, kwargs)
            program = self._program_for(signature, most, call, arguments)
            if program is not None and program.takes(size):
                return self._compiled_steps(signature, program, arguments, size)
        loss, params = self._eager_step(args, kwargs)
        if signature is None:
            known[:] = [
                s for s in known if s.is_alive()
            ]  # graphs of replaced parameters are of no use
            known.append(CompiledSignature(params, arguments))
        return [loss]

    def _with_other_aliases(
        self, known: list[CompiledSignature], arguments: list[Tensor]
    ) -> CompiledSignature | None:
        """A signature for arguments that differ from earlier ones in their aliases only, without another eager step."""
        for earlier in known:
            if earlier.is_current(self._steps) and not earlier.suits(arguments):
                known.append(CompiledSignature(earlier.params, arguments))
                return known[-1]
        return None

    def _program_for(
        self, signature: CompiledSignature, most: int, call: Call, arguments: list[Tensor]
    ) -> StepProgram | None:
        """The program of `most` steps, or None, with a warning, where the steps have to be eager."""
        if (reason := signature.conflict(arguments)) is None:
            try:
                program = self._program(signature, most, call, arguments)
            except UnsupportedForCompilation as unsupported:
                signature.is_unsupported = True
                self._fall_back(unsupported)
                return None
            if (reason := signature.conflict(arguments)) is None:
                return program
        self._fall_back(reason)  # with these arguments; others may share no memory
        return None

    def _program(
        self, signature: CompiledSignature, most: int, call: Call, arguments: list[Tensor]
    ) -> StepProgram:
        if signature.traced is None:
            if self._graphs == MAX_GRAPHS:
                raise UnsupportedForCompilation(
                    f"{MAX_GRAPHS} graphs were made, for other arguments, parameters or closed-over values each; pass "
                    "numbers that change as tensors, and batches of few sizes"
                )
            self._graphs += 1
            signature.trace(call, arguments)
        signature.check(call, arguments)
        if most in signature.programs:
            return signature.programs[most]
        owner = partial(owner_of, self.optim)
        return signature.build(call, owner, arguments, most, self.backend)

    def _compiled_steps(
        self,
        signature: CompiledSignature,
        program: StepProgram,
        arguments: list[Tensor],
        size: int,
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
        """An eager step, and the unconstrained parameters that it read."""
        with recorded_parameters() as params:
            loss = self._eager.step(*args, **kwargs)
        self._steps += 1
        return loss, {name: p for name, p in params.items() if p.requires_grad}

    def _fall_back(self, reason: object) -> None:
        """Warns of eager steps, once."""
        if self._fallback_reason is None:
            self._fallback_reason = str(reason)
            warnings.warn(f"CompiledSVI takes eager steps: {reason}", stacklevel=5)


class CompiledTraining:
    """Compiled steps on one set of arguments, with the gradients clipped to `clip_norm` together.

    Args:
        loss, model, guide, args, kwargs: the loss of a model and a guide with these arguments.
        params: the unconstrained parameters by name.
        optim: a torch optimizer or a `PyroOptim`, after a first eager step, which makes its state.
        clip_norm: the largest joint norm of the gradients.
        backend: as for `CompiledSVI`.

    Raises:
        UnsupportedForCompilation: if the step cannot be compiled; nothing has changed.
    """

    def __init__(
        self,
        loss: ELBO,
        model: Program,
        guide: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        params: Mapping[str, Tensor],
        optim: PyroOptim | torch.optim.Optimizer,
        clip_norm: float = math.inf,
        backend: Backend = "inductor",
    ):
        self._call = Call(loss, model, guide, args, kwargs)
        with failures_unsupported():
            _, self._arguments = read_arguments(args, kwargs)
        trained = {name: p for name, p in params.items() if p.requires_grad}
        self._signature = CompiledSignature(trained, self._arguments)
        self._check_memory()
        with SparseSubsample():
            self._signature.trace(self._call, self._arguments)
        self._program = self._signature.build(
            self._call, partial(owner_of, optim), self._arguments, 1, backend, clip_norm
        )
        self._check_memory()

    def _check_memory(self) -> None:
        if (reason := self._signature.conflict(self._arguments)) is not None:
            raise UnsupportedForCompilation(reason)

    def step(self) -> float | None:
        """Takes a step; returns the loss before it, or None (and no update) if it or its gradient is not finite.

        Raises:
            UnsupportedForCompilation: if parameters, closed-over state or the optimizer have changed; no step was taken.
        """
        with SparseSubsample():
            self._signature.check(self._call, self._arguments)
        if not self._signature.is_current(self._program.steps_seen):
            raise UnsupportedForCompilation(
                "parameters, closed-over state or settings of the optimizer have changed"
            )
        [loss] = self._program(self._arguments, self._call.loss)
        self._signature.calls += 1
        return None if math.isnan(loss) else loss
