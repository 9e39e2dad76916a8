"""Whether a graph computes what the handlers compute, elsewhere than where it was traced."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress

import pyro
import torch
from torch import Tensor

from ..elbo import AnnealedELBO
from .arguments import Call, unaliased, with_tensors
from .refusal import Refusal
from .tracing import LossGraph, unchanged

# Seeds of the comparisons, and β of annealed bounds there; further seeds where the loss is not finite.
TRIALS = {1729: 0.3, 4104: 0.8}
ATTEMPTS = 5
# Parameters move by this times (1 + |p|) N(0, 1), or by less where the loss is not finite there.
MOVES = (0.1, 0.01, 0.001)
# The first two comparisons are at the arguments given, this one is at others.
ELSEWHERE = 9271


def verify(
    traced: LossGraph,
    call: Call,
    params: Mapping[str, Tensor],
    arguments: Sequence[Tensor],
    again: bool = False,
) -> None:
    """Raises `Refusal` unless graph and handlers agree on loss and gradients, at moved parameters and with fresh draws.

    What a program computes outside of torch is a constant of its graph, and agrees wherever nothing has changed. So all
    changes here: parameters, draws, mini-batches, β, the seeds of all generators. Everything is as before afterwards.
    One more comparison is at other arguments: copies of those given, each changed in its own way, so that no two are
    aliases. It is left out where the program raises or is not finite there.
    `again`: by one comparison at the arguments given, which is enough to see that something has changed.
    """
    leaves = list(params.values())
    for first_seed, at in list(TRIALS.items())[again:]:
        beta = at if isinstance(call.loss, AnnealedELBO) else None
        for seed, move in itertools.product(range(first_seed, first_seed + ATTEMPTS), MOVES):
            with unchanged():
                _move(leaves, move, seed)
                expected = _by_handlers(call, beta, leaves)
            if all(bool(value.isfinite().all()) for value in expected if value is not None):
                break
        else:
            raise Refusal(
                "loss or gradient is not finite near the present parameters, so that nothing can be compared"
            )
        with unchanged():
            _move(leaves, move, seed)
            got = _by_graph(traced, leaves, arguments, beta)
        _compare(params, expected, got)
    if arguments and not again:
        _verify_elsewhere(traced, call, params, arguments)


def _verify_elsewhere(
    traced: LossGraph, call: Call, params: Mapping[str, Tensor], arguments: Sequence[Tensor]
) -> None:
    leaves = list(params.values())
    beta = 0.5 if isinstance(call.loss, AnnealedELBO) else None
    expected: list[Tensor | None] = []
    changed = [_changed(arguments) for _ in range(2)]  # the program may write into them
    # The program may raise anything at data that it was not written for. The comparisons at the data given hold.
    with unchanged(), suppress(Exception):
        _move(leaves, MOVES[-1], ELSEWHERE)
        expected = _by_handlers(with_tensors(call, changed[0]), beta, leaves)
    if not expected or not all(bool(v.isfinite().all()) for v in expected if v is not None):
        return
    with unchanged():
        _move(leaves, MOVES[-1], ELSEWHERE)
        got = _by_graph(traced, leaves, changed[1], beta)
    _compare(params, expected, got)


def _changed(arguments: Sequence[Tensor]) -> list[Tensor]:
    """Copies with rows in another order, by another shift for each, or, of single numbers, on another scale.

    So each keeps its support.
    """
    copies = unaliased(arguments)
    for i, (tensor, copy) in enumerate(zip(arguments, copies, strict=True), 1):
        if 0 in tensor.stride():  # its rows are one
            copy.as_strided((1,), (1,)).mul_(0.9**i if tensor.dtype.is_floating_point else 1)
        elif tensor.dim() > 0 and len(tensor) > 1:
            copy.copy_(tensor.roll(i % len(tensor) or 1, 0))
        elif tensor.dtype.is_floating_point:
            copy.mul_(0.9**i)
    return copies


def _move(params: Sequence[Tensor], move: float, seed: int) -> None:
    """Moves the parameters, and seeds what comes after."""
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
        # Copies, since what was written to is about to be put back as it was.
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
    value, *grads = traced.merged(*params, *arguments, *betas, *traced.others)
    value, rest = value.clone(), iter([g.clone() for g in grads])
    return [value, *(next(rest) if reached else None for reached in traced.reached)]


def _compare(
    params: Mapping[str, Tensor],
    expected: Sequence[Tensor | None],
    got: Sequence[Tensor | None],
) -> None:
    what = ["the loss", *(f"the gradient of {name!r}" for name in params)]
    for name, a, b in zip(what, expected, got, strict=True):
        if a is None and b is None:
            continue
        # A parameter that is not reached may have a gradient of zeros instead of none.
        a, b = (torch.zeros_like(y) if x is None else x for x, y in ((a, b), (b, a)))  # type: ignore[arg-type]
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        # The operations are the same in the same order, but for fused kernels of some of them.
        eps = max(torch.finfo(b.dtype).eps, 1e-12)
        size = a.abs().max().item() if a.numel() else 0.0
        if not error <= 1e3 * eps * (1 + size):
            raise Refusal(
                f"its graph is not the program: at other parameters and draws {name} differs by {error:.2g}. Something "
                "that changes is a constant of the graph: a number computed outside of torch, a counter, a generator of "
                "Python or numpy"
            )
