"""Posteriors with reference answers: 13 of posteriordb and 3 of the Inference Gym, as Pyro models in float64.

    PYRO_FLOWS_DATA=path/to/data python benchmarks/targets/check.py

checks every model against its reference. `load(name)` gives a `Target`; `TARGETS` are the names, each with the function
that reads it. The data stay outside the repository: see `data_root`.
"""

from __future__ import annotations

from collections.abc import Callable

from . import inference_gym, posteriordb
from .target import Reference, Target, data_root

TARGETS: dict[str, Callable[[], Target]] = {**posteriordb.TARGETS, **inference_gym.TARGETS}


def load(name: str) -> Target:
    """The target of this name, its data and reference read. Raises `ValueError` for a name that is none."""
    if name not in TARGETS:
        raise ValueError(f"no target {name!r}: expected one of {', '.join(TARGETS)}")
    return TARGETS[name]()


__all__ = ["TARGETS", "Reference", "Target", "data_root", "load"]
