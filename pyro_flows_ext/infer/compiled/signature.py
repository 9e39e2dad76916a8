"""Calls that one graph suits, the programs compiled from the graph, and its comparison with Pyro's handlers."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import compress
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..elbo import AnnealedELBO
from .call import Call, aliases, check_loss, state_of, storages, unaliased, with_tensors
from .guards import StateGuard
from .program import Backend, StepProgram
from .tracing import LossGraph, trace_loss, unchanged
from .unsupported import UnsupportedForCompilation, failures_unsupported
from .updates import Owner, Updates

# A graph is compared with the handlers again after this number of calls, and whenever their number has grown by the factor.
FIRST_CHECK, FACTOR = 8, 4
# Seeds of the comparisons with β of annealed bounds; seeds that follow are tried where the loss is not finite.
TRIALS = {1729: 0.3, 4104: 0.8}
ATTEMPTS = 5
# Parameters move by this times (1 + |p|) N(0, 1), or by less where the loss is not finite there.
MOVES = (0.1, 0.01, 0.001)
# Seed of the comparison at changed arguments.
CHANGED_SEED = 9271


class CompiledSignature:
    """Calls whose arguments have one structure and one pattern of aliases, after a first eager one.

    `params`: the unconstrained parameters by name. `arguments`: the tensors of the first call. `is_unsupported`: steps
    stay eager.
    """

    def __init__(self, params: dict[str, Tensor], arguments: Sequence[Tensor]):
        # A parameter with several names counts once.
        self.params = {name: p for p, name in {p: name for name, p in params.items()}.items()}
        self.traced: LossGraph | None = None
        self.programs: dict[int, StepProgram] = {}
        self.guard = StateGuard(())
        self.is_unsupported = False
        self.calls, self.next_check = 0, FIRST_CHECK
        self._reserved = storages(list(self.params.values()))  # written to by every step
        self._closed_over: list[Tensor] = []
        self._addresses: set[int] = set()
        self._aliases = self._aliases_of(arguments)

    # --- whether it suits a call ---

    def is_alive(self) -> bool:
        """Whether the parameters are still those of the store."""
        store: Any = pyro.get_param_store().named_parameters()
        return all(store.mapping.get(name) is p for name, p in self.params.items())

    def is_current(self, steps: int) -> bool:
        """Whether parameters, closed-over state and optimizers are those of the programs, after `steps` steps in all."""
        return (
            self.is_alive()
            and self.guard.holds()
            and all(p.is_current(p.steps_seen != steps) for p in self.programs.values())
        )

    def suits(self, arguments: Sequence[Tensor]) -> bool:
        """Whether the aliases among arguments and closed-over tensors are those of the first call."""
        return self._aliases_of(arguments) == self._aliases

    def _aliases_of(self, arguments: Sequence[Tensor]) -> Hashable:
        if any(t.data_ptr() in self._addresses for t in arguments):
            return aliases(arguments, self._closed_over)
        return aliases(arguments) if len(arguments) > 1 else None

    def conflict(self, arguments: Sequence[Tensor]) -> str | None:
        """The reason for eager steps with these arguments where memory that is written to is also read, else None."""
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
        """Traces the graph and compares it with the handlers."""
        with failures_unsupported():
            self._trace(call, arguments)

    def _trace(self, call: Call, arguments: Sequence[Tensor]) -> None:
        check_loss(call.loss)
        params = list(self.params.values())
        if not params:
            raise UnsupportedForCompilation("there is no parameter to train")
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
        """Compares the graph with the handlers again when that is due. Raises `UnsupportedForCompilation` where they differ."""
        if self.traced is not None and self.calls == self.next_check:
            self.next_check *= FACTOR
            with failures_unsupported():
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
        with failures_unsupported():
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
    """Collects the modules that are called within."""
    called: list[nn.Module] = []
    handle = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        yield called
    finally:
        handle.remove()


# --- comparison with the handlers ---


def verify(
    traced: LossGraph,
    call: Call,
    params: Mapping[str, Tensor],
    arguments: Sequence[Tensor],
    again: bool = False,
) -> None:
    """Raises `UnsupportedForCompilation` unless graph and handlers agree on loss and gradients.

    Values computed outside of torch are constants of the graph, and agree wherever nothing has changed. So parameters,
    draws, mini-batches, β and the seeds of all generators differ from those of the trace. A last comparison is at other
    arguments: copies, each changed in its own way, so that no two are aliases. It is left out where the program raises
    or is not finite there. `again`: one comparison at the arguments given, for a graph that has passed before.
    """
    leaves = list(params.values())
    for first_seed, at in list(TRIALS.items())[again:]:
        beta = at if isinstance(call.loss, AnnealedELBO) else None
        for seed, move in itertools.product(range(first_seed, first_seed + ATTEMPTS), MOVES):
            with unchanged():
                _move(leaves, move, seed)
                expected = _by_handlers(call, beta, leaves)
            if _is_finite(expected):
                break
        else:
            raise UnsupportedForCompilation(
                "loss or gradient is not finite near the present parameters, so that nothing can be compared"
            )
        with unchanged():
            _move(leaves, move, seed)
            got = _by_graph(traced, leaves, arguments, beta)
        _compare(params, expected, got)
    if arguments and not again:
        _verify_changed(traced, call, params, arguments)


def _verify_changed(
    traced: LossGraph, call: Call, params: Mapping[str, Tensor], arguments: Sequence[Tensor]
) -> None:
    leaves = list(params.values())
    beta = 0.5 if isinstance(call.loss, AnnealedELBO) else None
    expected: list[Tensor | None] = []
    changed = [_changed(arguments) for _ in range(2)]  # the program may write into them
    # The program may raise anything at data that it was not written for. The comparisons at the data given hold.
    with unchanged(), suppress(Exception):
        _move(leaves, MOVES[-1], CHANGED_SEED)
        expected = _by_handlers(with_tensors(call, changed[0]), beta, leaves)
    if not expected or not _is_finite(expected):
        return
    with unchanged():
        _move(leaves, MOVES[-1], CHANGED_SEED)
        got = _by_graph(traced, leaves, changed[1], beta)
    _compare(params, expected, got)


def _changed(arguments: Sequence[Tensor]) -> list[Tensor]:
    """Copies with their rows shifted, each by another number, or, of single numbers, scaled: values keep their support."""
    copies = unaliased(arguments)
    for i, (tensor, new) in enumerate(zip(arguments, copies, strict=True), 1):
        if 0 in tensor.stride():  # all rows are one
            new.as_strided((1,), (1,)).mul_(0.9**i if tensor.dtype.is_floating_point else 1)
        elif tensor.dim() > 0 and len(tensor) > 1:
            new.copy_(tensor.roll(i % len(tensor) or 1, 0))
        elif tensor.dtype.is_floating_point:
            new.mul_(0.9**i)
    return copies


def _move(params: Sequence[Tensor], move: float, seed: int) -> None:
    """Seeds all generators and moves the parameters."""
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        for p in params:
            p.add_(move * (1 + p.abs()) * torch.randn_like(p))


def _by_handlers(call: Call, beta: float | None, params: Sequence[Tensor]) -> list[Tensor | None]:
    loss = call.loss
    if beta is not None:
        loss = AnnealedELBO(loss.elbo, lambda step: beta, loss.term)
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss.loss_and_grads(call.model, call.guide, *call.args, **call.kwargs)
        # Copies, since tensors that were written to are restored.
        return [
            torch.tensor(value, dtype=torch.float64),
            *(None if p.grad is None else p.grad.clone() for p in params),
        ]
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


@torch.no_grad()
def _by_graph(
    traced: LossGraph, params: Sequence[Tensor], arguments: Sequence[Tensor], beta: float | None
) -> list[Tensor | None]:
    betas = [] if beta is None else [params[0].new_tensor(beta)]
    value, *grads = traced.graph(*params, *arguments, *betas, *traced.others)
    value, rest = value.clone(), iter([g.clone() for g in grads])
    return [value, *(next(rest) if reached else None for reached in traced.reached)]


def _is_finite(values: Sequence[Tensor | None]) -> bool:
    return all(bool(value.isfinite().all()) for value in values if value is not None)


def _compare(
    params: Mapping[str, Tensor],
    expected: Sequence[Tensor | None],
    got: Sequence[Tensor | None],
) -> None:
    names = ["the loss", *(f"the gradient of {name!r}" for name in params)]
    for name, a, b in zip(names, expected, got, strict=True):
        # A parameter that is not reached may have a gradient of zeros instead of none.
        if a is None:
            if b is None:
                continue
            a = torch.zeros_like(b)
        elif b is None:
            b = torch.zeros_like(a)
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        # The operations are the same in the same order, except for fused kernels of some of them.
        eps = max(torch.finfo(b.dtype).eps, 1e-12)
        size = a.abs().max().item() if a.numel() else 0.0
        if not error <= 1e3 * eps * (1 + size):
            raise UnsupportedForCompilation(
                f"the traced graph does not reproduce the program: at other parameters and draws {name} differs by {error:.2g}. "
                "A value that changes is a constant of the graph: a number computed outside of torch, a counter, a draw of "
                "Python's or numpy's generators. Pass it as a tensor argument"
            )
