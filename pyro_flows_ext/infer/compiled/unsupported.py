"""Programs and inputs that cannot become a graph: detection, and the line of the user's code in the reason."""

from __future__ import annotations

import functools
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

# Conversions that bypass the dispatcher: their results would be constants of the graph.
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


class UnsupportedForCompilation(Exception):
    """A training step cannot be compiled; the message is the reason."""


@contextmanager
def failures_unsupported() -> Iterator[None]:
    """Turns any error within into `UnsupportedForCompilation`: eager steps remain possible.

    Among these errors are private interfaces of torch that a later version renames.
    """
    try:
        yield
    except UnsupportedForCompilation:
        raise
    except Exception as error:
        message = (str(error).strip().split("\n") or [""])[0]
        reason = f"{type(error).__name__}: {message}{line_of(error)}"
        raise UnsupportedForCompilation(f"compiling failed with {reason}") from error


def check_plain(tensor: Tensor, what: str, where: Callable[[], str] = str) -> None:
    """Raises `UnsupportedForCompilation` unless `tensor` is dense and strided, as inputs of a graph must be."""
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
        raise UnsupportedForCompilation(
            f"{what} is {kind}; compiled steps take dense, strided tensors{where()}"
        )


@contextmanager
def value_reads_unsupported() -> Iterator[None]:
    """Raises `UnsupportedForCompilation` where Python reads the values of a tensor, directly or as a shape.

    A graph would hold such values as constants.
    """
    with _Exits(), _dispatch_mode()():
        yield


@functools.cache
def _dispatch_mode() -> type:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            _check_operation(func, args)
            return func(*args, **(kwargs or {}))

    return Reads


def _check_operation(func: Any, args: tuple[Any, ...]) -> None:
    if torch.Tag.data_dependent_output in func.tags:
        raise UnsupportedForCompilation(
            f"a value is read off a tensor, by .item(), float() or `if`{_where()}"
        )
    if torch.Tag.dynamic_output_shape in func.tags and (
        func is not torch.ops.aten.index.Tensor or _has_mask(args[1])
    ):
        raise UnsupportedForCompilation(
            f"a shape depends on values, by a boolean index or {func.overloadpacket.__name__}{_where()}"
        )
    for arg in args:
        for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(tensor, Tensor):
                check_plain(tensor, "a tensor that the program reads", _where)


class _Exits(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _EXITS:
            raise UnsupportedForCompilation(f"a tensor leaves torch by {_EXITS[func]}{_where()}")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


# --- the line of code ---


def _where() -> str:
    """The current line: the innermost one of the user's code, or of a library where there is none."""
    return _describe(traceback.walk_stack(sys._getframe(2)))


def line_of(error: BaseException) -> str:
    """The line that raised an error, in parentheses."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return _describe(reversed(frames))


def _describe(frames: Any) -> str:
    inner: tuple[FrameType, int] | None = None
    for frame, line in frames:
        name = frame.f_code.co_filename
        if name.startswith(_HERE):
            if name.endswith("tracing.py"):  # the frames outside of it belong to the caller
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
