"""What cannot become a graph: values that Python reads off a tensor, and the line that reads them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Ways out of torch that pass no dispatcher: what is computed there would be a constant of the graph.
_EXITS = {
    Tensor.numpy: ".numpy()",
    Tensor.tolist: ".tolist()",
    Tensor.__array__: "numpy",
    Tensor.__dlpack__: "dlpack",
}
_LIBRARIES = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (torch.__file__, pyro.__file__, __file__ + "/../..")
)

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class Refusal(Exception):
    """Why a program is not compiled."""


def check_plain(tensor: Tensor, what: str, where: Callable[[], str] = str) -> None:
    """Raises `Refusal` unless a tensor is a dense, strided one, which a graph can have as an input."""
    kind = None
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = f"of the class {type(tensor).__name__}"
    elif tensor.is_nested:
        kind = "nested"
    elif tensor.layout is not torch.strided:
        kind = f"of the layout {tensor.layout}"
    elif tensor.is_quantized:
        kind = "quantized"
    elif tensor.is_neg() or tensor.is_conj():
        kind = "a lazily negated or conjugated view"
    if kind is not None:
        raise Refusal(f"{what} is {kind}; compiled steps take dense, strided tensors{where()}")


@contextmanager
def reads_refused() -> Iterator[None]:
    """Raises `Refusal` where a number, a truth value, a shape or an array is made of the values of a tensor.

    Such values are those of one moment; a graph would repeat them for ever.
    """
    with _Exits(), _Reads():
        yield


class _Reads(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise Refusal(f"a value is read off a tensor, by .item(), float() or `if`{_where()}")
        if torch.Tag.dynamic_output_shape in func.tags and (
            func is not torch.ops.aten.index.Tensor or _has_mask(args[1])
        ):
            raise Refusal(
                f"a shape depends on values, by a boolean index or {func.overloadpacket.__name__}{_where()}"
            )
        for arg in args:
            for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(tensor, Tensor):
                    check_plain(tensor, "a tensor that the program reads", _where)
        return func(*args, **(kwargs or {}))


class _Exits(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _EXITS:
            raise Refusal(f"a tensor leaves torch by {_EXITS[func]}{_where()}")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _where() -> str:
    """The line being run: the innermost of the user's, or of any library's if there is none."""
    return _describe(traceback.walk_stack(sys._getframe(2)))


def line_of(error: BaseException) -> str:
    """The line that an error comes from, as a remark in brackets."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return _describe(reversed(frames))


def _describe(frames: Any) -> str:
    inner: tuple[FrameType, int] | None = None
    for frame, line in frames:
        name = frame.f_code.co_filename
        if name.startswith(_HERE):
            if name.endswith("tracing.py"):  # outside of it is who called for the program
                break
            continue
        if inner is None and not name.startswith(_LIBRARIES[:1]):
            inner = frame, line
        if not name.startswith(_LIBRARIES) and not name.startswith(os.path.dirname(os.__file__)):
            inner = frame, line
            break
    if inner is None:
        return ""
    name, line = inner[0].f_code.co_filename, inner[1]
    [summary] = traceback.StackSummary.extract([inner])
    source = f": {summary.line}" if summary.line else ""
    return f" ({os.path.basename(name)}, line {line}{source})"
