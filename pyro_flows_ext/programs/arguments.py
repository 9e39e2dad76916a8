"""Values of a program's arguments that are NaN or infinite, by name and position."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from .traces import Program

# Draws of the prior at which a log joint may be finite: some are outside of a support by chance.
ATTEMPTS = 5
# Numbers checked at a time, so that the check of a memory-mapped argument takes some megabytes.
CHUNK = 2**20


def describe_nonfinite(
    name: str, value: Any, *, start: int = 0, columns: Sequence[str] | None = None
) -> str | None:
    """How many numbers of an argument are NaN or infinite, and the first of them; None where all are finite.

    Args:
        name: of the argument, for the message.
        value: a tensor, an array or a number; anything else has no numbers.
        start: the number of its first row, where it is a part of the argument.
        columns: names of the columns of a matrix.

    Example:
        >>> import torch
        >>> describe_nonfinite("y", torch.tensor([1.0, float("nan"), 2.0]))
        'y: 1 of 3 values is NaN, the first in row 1 (y[1], rows counted from 0)'
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            return None
        if not (value.is_floating_point() or value.is_complex()):
            return None
        if _is_finite(value.detach()):
            return None
        finite, nan = value.detach().isfinite(), value.detach().isnan()
    elif isinstance(value, float | np.ndarray | np.floating):
        array = np.asarray(value)
        if array.dtype.kind not in "fc":
            return None
        finite, nan = torch.as_tensor(np.isfinite(array)), torch.as_tensor(np.isnan(array))
    else:
        return None
    count = int((~finite).sum())
    if count == 0:
        return None
    num_nan = int(nan.sum())
    kind = {count: "NaN", 0: "infinite"}.get(num_nan, f"NaN ({num_nan}) or infinite")
    verb = "is" if count == 1 else "are"
    text = f"{name}: {count} of {finite.numel()} values {verb} {kind}"
    if finite.dim() == 0:
        return f"{name}: expected a finite number, got {float(value)}"
    first = (~finite).nonzero()[0].tolist()
    first[0] += start
    where = f"{name}[{', '.join(map(str, first))}]"
    if columns is not None and len(first) == 2:
        where = f"column {columns[first[1]]!r}"
    return f"{text}, the first in row {first[0]} ({where}, rows counted from 0)"


def _is_finite(value: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    if value.numel() <= CHUNK:
        return bool(value.isfinite().all())
    rows = max(1, CHUNK // (value.numel() // len(value)))
    return all(bool(part.isfinite().all()) for part in value.split(rows))


def nonfinite_arguments(
    program: Program, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> list[str]:
    """A sentence of `describe_nonfinite` for each argument with NaN or infinite values, lists and dicts included."""
    named = _names(program, args, kwargs or {})
    found = (describe_nonfinite(name, value) for name, value in _leaves(named.items()))
    return [text for text in found if text is not None]


def check_finite_log_joint(
    model: Program, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> None:
    """Names the arguments that are NaN or infinite where the log joint is not finite for that reason.

    Values that the model masks (`obs_mask=`, `poutine.mask`) may be NaN: the check draws from the prior, and
    passes if the log joint of one draw is finite. Models with finite arguments are not run.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: the log joint is not finite, and arguments have NaN or infinite values.
    """
    found = nonfinite_arguments(model, args, kwargs)
    if not found or any(_has_finite_log_joint(model, args, kwargs or {}) for _ in range(ATTEMPTS)):
        return
    raise ValueError(
        f"{'; '.join(found)}. The log joint of the model is not finite. Leave such rows out, impute them as latents, or "
        "mask them with obs_mask= or poutine.mask"
    )


def _has_finite_log_joint(model: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # Without Pyro's checks, which raise for NaN in rows that a mask leaves out.
    with (
        torch.no_grad(),
        poutine.block(),
        pyro.get_param_store().scope(),
        torch.random.fork_rng(devices=[]),
        pyro.validation_enabled(False),
    ):
        try:
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            return bool(torch.as_tensor(trace.log_prob_sum()).isfinite())
        except (ValueError, RuntimeError):
            return False


def _names(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the program's parameters, by position where it has none."""
    function: Callable[..., Any] = (
        program.forward if isinstance(program, torch.nn.Module) else program
    )
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = inspect.signature(function).parameters[name].kind
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _leaves(items: Any) -> Iterator[tuple[str, Any]]:
    """The values in nested lists, tuples and dicts, by names such as `data['x']` and `xs[0]`."""
    for name, value in items:
        if isinstance(value, Mapping):
            yield from _leaves((f"{name}[{key!r}]", inner) for key, inner in value.items())
        elif isinstance(value, list | tuple):
            yield from _leaves((f"{name}[{i}]", inner) for i, inner in enumerate(value))
        else:
            yield name, value
