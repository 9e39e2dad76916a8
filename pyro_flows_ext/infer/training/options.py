"""The arguments of `fit`, checked, and the options of its runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyro.optim import PyroOptim

from ...ops import check_automatic
from .._loop import check_factories, check_settings
from .run import Options


def options_of(given: dict[str, Any]) -> Options:
    """The options of a run from the arguments of `fit`. Raises `ValueError` for those out of range."""
    _check_options(given)
    names = {field.name for field in dataclasses.fields(Options)} & given.keys()
    options = Options(
        **{name: given[name] for name in names - {"max_steps"}},
        max_steps=given["max_steps"] if given["num_steps"] is None else given["num_steps"],
        is_fixed=given["num_steps"] is not None,
    )
    is_eager = options.checkpoint is not None or options.scheduler is not None
    if options.compile == "auto" and is_eager:
        # Compiled steps differ from eager ones by rounding, and a resumed run would switch at another step. They read
        # rates at every step, but not the momenta that some schedulers set.
        return dataclasses.replace(options, compile=False)
    return options


def _check_options(given: dict[str, Any]) -> None:
    for name in ("num_steps", "num_particles"):
        if given[name] is not None:
            check_settings(given["lr"], given["schedule"], **{name: given[name]})
    check_settings(given["lr"], given["schedule"], max_steps=given["max_steps"])
    for name in ("warm_start", "refine", "compile"):
        check_automatic(name, given[name])
    if not 0 < given["target_ess"] < 1:
        raise ValueError(f"target_ess: expected a number in (0, 1), got {given['target_ess']!r}")
    if given["resume"] and given["checkpoint"] is None:
        raise ValueError("resume: expected checkpoint=, the file to go on from")
    _check_scheduler(given)
    if given["checkpoint"] is not None and isinstance(given["optim"], PyroOptim):
        raise ValueError("optim: expected a torch optimizer for a checkpoint, got a PyroOptim")


def _check_scheduler(given: dict[str, Any]) -> None:
    if given["scheduler"] is None:
        return
    check_factories(scheduler=given["scheduler"])
    if given["num_steps"] is None:
        raise ValueError(
            "scheduler: expected num_steps= beside it, got None, and rounds set their own rates; give num_steps=, or leave "
            "scheduler out"
        )
    if isinstance(given["optim"], PyroOptim):
        raise ValueError(
            "scheduler: expected a torch optimizer, got a PyroOptim, which keeps its own rates; give "
            "optim=partial(torch.optim.Adam, lr=...)"
        )
    if given["compile"] is True:
        raise ValueError(
            "scheduler: expected eager steps, got compile=True; leave compile out, or use schedule="
        )
