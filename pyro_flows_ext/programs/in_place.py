"""In-place writes of a model under `torch.vmap`: the tensor that is written to gets the dimension of the particles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Statements that write to their first operand.
OPERATORS = frozenset(
    f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow")
)


class BatchedWrites(TorchFunctionMode):
    """Lets a model write values that differ between particles into tensors that do not: `x[missing] = latent`.

    `torch.vmap` refuses such a write, since the memory of one tensor cannot hold the values of all particles. Within this
    mode the write goes to a copy with the dimension of the particles, and the copy stands in for the tensor in all later
    calls. The tensor itself keeps its values. Writes through a view are refused as before: its base would not follow.

    Args:
        particle: any tensor with the dimension of the particles, from inside `torch.vmap`.
    """

    def __init__(self, particle: Tensor):
        super().__init__()
        self.particle = particle
        # By identity, with the tensor itself, so that its id is not used again.
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.copies:
            args, kwargs = self._replaced(args), self._replaced(kwargs)
        if not _writes(func) or not args or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if args[0]._is_view():
                raise RuntimeError(
                    f"{func.__name__} writes values that differ between particles through a view; write to the whole "
                    "tensor, or use torch.where or index_put"
                ) from error
        written = args[0]
        never = torch.zeros_like(self.particle.detach().sum(), dtype=torch.bool)
        copy = torch.where(never, written, written)  # with the dimension of the condition
        result = func(copy, *args[1:], **kwargs)
        self.copies[id(written)] = (written, copy)
        return result

    def _replaced(self, value: Any) -> Any:
        """`value` with the copies in place of the tensors that were written to, within containers too."""
        if isinstance(value, Tensor):
            return self.copies.get(id(value), (value, value))[1]
        if type(value) in (tuple, list):
            return type(value)(self._replaced(v) for v in value)
        if type(value) is dict:
            return {key: self._replaced(v) for key, v in value.items()}
        return value


def _writes(func: Any) -> bool:
    """Whether a function writes to its first argument: `__setitem__`, `x += y`, and methods that end with an underscore."""
    name = getattr(func, "__name__", "")
    return name in OPERATORS or (name.endswith("_") and not name.startswith("_"))
