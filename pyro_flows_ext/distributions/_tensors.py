"""Distributions as trees of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.nn import Module


def map_tensors(obj: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a distribution with `fn` applied to every tensor in it: its parameters, support and base.

    Modules inside are left as they are: they move with their own methods.
    """
    if isinstance(obj, Tensor):
        return fn(obj)
    if isinstance(obj, Module):
        return obj
    if isinstance(obj, (Distribution, Transform, Constraint)):
        new = copy.copy(obj)
        new.__dict__.update({k: map_tensors(v, fn) for k, v in vars(obj).items()})
        return new
    if type(obj) in (list, tuple):
        return type(obj)(map_tensors(v, fn) for v in obj)
    if type(obj) is dict:
        return {k: map_tensors(v, fn) for k, v in obj.items()}
    return obj
