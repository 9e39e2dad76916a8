"""Distributions as trees of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform
from torch.nn import Module


def map_tensors(obj: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a distribution with `fn` applied to every tensor in it: its parameters, support and base.

    Modules inside are left as they are: they move with their own methods. Transforms lose their caches.
    """
    return _map(obj, fn, {})


def _map(obj: Any, fn: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    if isinstance(obj, Tensor):
        return fn(obj)
    if isinstance(obj, Module):
        return obj
    if isinstance(obj, (Distribution, Transform, Constraint)):
        if id(obj) in memo:
            return memo[id(obj)]
        if isinstance(obj, _InverseTransform):
            memo[id(obj)] = inverse = _map(obj.inv, fn, memo).inv
            return inverse
        memo[id(obj)] = new = copy.copy(obj)
        state = dict(vars(obj))
        if isinstance(obj, Transform):
            # A transform and its inverse refer to each other, and the cache to values of the original.
            state["_inv"] = None
            if "_cached_x_y" in state:
                state["_cached_x_y"] = (None, None)
        mapped = {k: _map(v, fn, memo) for k, v in state.items()}
        if isinstance(obj, Constraint) and all(mapped[k] is v for k, v in state.items()):
            memo[id(obj)] = obj  # torch compares constraints such as constraints.real by identity
            return obj
        new.__dict__.update(mapped)
        return new
    if type(obj) in (list, tuple):
        return type(obj)(_map(v, fn, memo) for v in obj)
    if type(obj) is dict:
        return {k: _map(v, fn, memo) for k, v in obj.items()}
    return obj
