"""Data by name as the keyword arguments of a model: their keys and their dtypes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor


def meet_floats(model: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The data with as few integer tensors turned into floats as the model needs to run.

    A product of an integer matrix and float coefficients is an error in torch, and so is a float as an index: which of
    the two a model does with a column only a run of it shows.
    """
    values = copy.copy(data)  # with the levels of factors
    whole = [k for k, v in values.items() if not v.is_floating_point() and v.dtype != torch.bool]
    if not whole or not _lacks_floats(model, values):
        return values
    # Of many columns, not all subsets: few integers among floats, or few floats among integers.
    sizes = (
        range(1, len(whole) + 1) if len(whole) <= 5 else (1, len(whole) - 2, len(whole) - 1, len(whole))
    )  # fmt: skip
    for size in sizes:
        for chosen in combinations(whole, size):
            trial = copy.copy(values)
            trial.update({k: values[k].to(torch.get_default_dtype()) for k in chosen})
            if not _lacks_floats(model, trial):
                return trial
    return values


def _lacks_floats(model: Any, data: dict[str, Tensor]) -> bool:
    """Whether the model fails with these values for their type: a mixture of types, or a float as an index."""
    with (
        torch.no_grad(),
        poutine.block(),
        pyro.get_param_store().scope(),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            poutine.trace(model).get_trace(**data).compute_log_prob()
        except (RuntimeError, IndexError, TypeError) as error:
            return any(word in str(error) for word in ("dtype", "Long", "Int", "long", "indices"))
        except Exception:  # the fit reports it
            return False
    return False


def check_keywords(name: str, model: Any, data: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the model can be called as `model(**data)`; `name` begins the message."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters)
    missing = [p.name for p in named if p.default is p.empty and p.name not in data]
    unexpected = [] if open_ended else [key for key in data if key not in {p.name for p in named}]
    if not missing and not unexpected:
        return
    wrong = [f"missing {', '.join(missing)}"] if missing else []
    wrong += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
    expected = ", ".join(p.name + ("" if p.default is p.empty else " (optional)") for p in named)
    raise ValueError(f"{name}: {'; '.join(wrong)}; expected {expected or 'no data'}")
