"""Models to fit: built in by name, or the user's own as `path/to/file.py:model`, and their data.

A model is called as `model(**data)`: the keys of the data are the names of its parameters.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..datasets import load_data
from ..testing.targets import TARGETS, Data, Target
from .failures import located


def load_target(
    spec: str,
    data: str | Path | Mapping[str, Tensor] | None = None,
    columns: Sequence[str] | None = None,
) -> tuple[Target, Data]:
    """The target that `spec` names, built in or `path/to/file.py:model`, and its data, from the file `data` if given.

    `columns`: those of the file to take; by default all.

    Whole numbers stay whole wherever the model runs with them, and become floats where it does not: see `meet_floats`.
    A file of Python is run, as by an import: name only files that you trust. Raises `ValueError` when there is no such
    target, the file does not run, or the keys of the data do not fit the model's parameters.
    """
    target = _load_model(spec) if ".py:" in spec else _built_in(spec)
    where = "no data given" if data is None else "the data given"
    if isinstance(data, str | Path):
        where, data = f"data {str(data)!r}", load_data(data, columns)
    elif columns is not None:
        raise ValueError("columns: expected some with a file of data only; add --data")
    values = target.data() if data is None else data if isinstance(data, dict) else dict(data)
    _check_keys(target, values, where)
    return target, values if data is None else meet_floats(target.model, values)


def meet_floats(model: Any, data: Data) -> Data:
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


def _lacks_floats(model: Any, data: Data) -> bool:
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


def _built_in(name: str) -> Target:
    if name not in TARGETS:
        raise ValueError(
            f"no target {name!r}: expected one of {', '.join(TARGETS)}, or path/to/file.py:model"
        )
    return TARGETS[name]


def _load_model(spec: str) -> Target:
    file, _, attribute = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no file {file!r} for the target {spec!r}")
    # A name of its own, so that no installed module is shadowed; in sys.modules, as dataclasses look there.
    name = f"_pyro_flows_target_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{file!r} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours, as when Python runs a script
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{file!r} raised {located(error)}") from error
    finally:
        sys.path.pop(0)
    model = getattr(module, attribute, None)
    if not callable(model):
        found = "nothing" if model is None else type(model).__name__
        raise ValueError(
            f"{file!r}: expected a model named {attribute!r}, a function, found {found}"
        )
    return Target(spec, model, dict, inspect.getdoc(model) or "")


def _check_keys(target: Target, data: Data, where: str) -> None:
    """The keys of the data must fit the model's parameters, neither more nor fewer."""
    function = target.model.forward if isinstance(target.model, torch.nn.Module) else target.model
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
    raise ValueError(
        f"{target.name}, {where}: {'; '.join(wrong)}; expected {expected or 'no data'}"
    )
