"""State of Python that a program reads and a graph holds as constants: whether it is still what it was."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from operator import getitem, is_
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

# Checking a slot takes some 50 ns at every step. Programs with more are guarded in part.
MAX_SLOTS = 5000
# Arrays of numpy up to this size are compared by their bytes, in about a microsecond.
MAX_ARRAY_BYTES = 4096

_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.Size, torch.layout),
)
_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_LIBRARIES = (
    *{
        os.path.abspath(sysconfig.get_path(name)) + os.sep
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
    },
    _PACKAGE,
    "<frozen",
)
_TABLES = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_MODULES = {*vars(nn.Module()), *_TABLES, "_pyro_context", "_pyro_name"} - {"training"}


class StateGuard:
    """What a program can read beside its arguments: closures, globals, attributes, parameters and buffers of modules.

    `roots`: the objects to start from. Containers are followed, attributes of objects, functions that functions refer
    to, and children of modules. Of objects whose class is a library's, public attributes count; of those of the user,
    all. `holds` compares by identity, and constants by value.
    """

    def __init__(self, roots: Iterable[Any]):
        self._containers: list[Any] = []
        self._keys: list[Any] = []
        self._expected: list[Any] = []
        self._cells: list[Any] = []
        self._contents: list[Any] = []
        self._sized: list[Any] = []
        self._sizes: list[int] = []
        self._tensors: list[Tensor] = []
        self._arrays: list[Any] = []
        _Walk(self, roots).run()
        self._addresses = list(map(_address, self._tensors))
        self._bytes = [array.tobytes() for array in self._arrays]

    def holds(self) -> bool:
        """Whether all is as it was."""
        return (
            self._sizes == list(map(len, self._sized))
            and self._slots_hold()
            and _all_same([_content(c) for c in self._cells], self._contents)
            and self._addresses == list(map(_address, self._tensors))
            and self._bytes == [array.tobytes() for array in self._arrays]
        )

    def _slots_hold(self) -> bool:
        try:
            if all(map(is_, map(getitem, self._containers, self._keys), self._expected)):
                return True
            return _all_same(list(map(getitem, self._containers, self._keys)), self._expected)
        except LookupError:
            return False

    def settle(self, checked: Iterable[Tensor] = ()) -> None:
        """Leaves out state that has changed since, which the program itself changes whenever it runs.

        `checked`: tensors whose memory is checked elsewhere.
        """
        elsewhere = set(map(id, checked))
        slots = zip(self._containers, self._keys, self._expected, strict=True)
        kept = [(c, k, v) for c, k, v in slots if _is_same(_item(c, k), v)]
        self._containers, self._keys, self._expected = _columns(kept, 3)
        cells = zip(self._cells, self._contents, strict=True)
        self._cells, self._contents = _columns(
            [(c, v) for c, v in cells if _is_same(_content(c), v)], 2
        )
        sizes = zip(self._sized, self._sizes, strict=True)
        self._sized, self._sizes = _columns([(c, n) for c, n in sizes if len(c) == n], 2)
        places = zip(self._tensors, self._addresses, strict=True)
        self._tensors, self._addresses = _columns(
            [(t, a) for t, a in places if _address(t) == a and id(t) not in elsewhere], 2
        )
        arrays = zip(self._arrays, self._bytes, strict=True)
        self._arrays, self._bytes = _columns([(x, b) for x, b in arrays if x.tobytes() == b], 2)

    # --- filled by the walk ---

    def add_slot(self, container: Any, key: Any, value: Any) -> None:
        self._containers.append(container)
        self._keys.append(key)
        self._expected.append(value)

    def add_cell(self, cell: Any) -> None:
        self._cells.append(cell)
        self._contents.append(_content(cell))

    def add_size(self, container: Any) -> None:
        self._sized.append(container)
        self._sizes.append(len(container))

    def add_tensor(self, tensor: Tensor) -> None:
        self._tensors.append(tensor)

    def add_array(self, array: Any) -> None:
        self._arrays.append(array)

    def __len__(self) -> int:
        return len(self._expected) + len(self._cells) + len(self._sized)


class _Walk:
    """Breadth first, so that what a program refers to itself is guarded first."""

    def __init__(self, guard: StateGuard, roots: Iterable[Any]):
        self.guard, self.seen = guard, set[int]()
        self.queue: deque[Any] = deque(roots)
        self.alive: list[Any] = []  # ids are those of objects that live

    def run(self) -> None:
        while self.queue and len(self.guard) < MAX_SLOTS:
            value = self.queue.popleft()
            if id(value) in self.seen or isinstance(value, _CONSTANTS):
                continue
            self.seen.add(id(value))
            self.alive.append(value)
            self.visit(value)

    def visit(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_nested:
                self.guard.add_tensor(value)
        elif isinstance(value, (list, dict)):
            self.guard.add_size(value)
            items = enumerate(value) if isinstance(value, list) else list(value.items())
            self.slots(value, items)
        elif isinstance(value, (tuple, frozenset)):
            self.queue.extend(value)
        elif isinstance(value, set):
            self.guard.add_size(value)
        elif isinstance(value, functools.partial):
            self.queue.extend((value.func, *value.args, value.keywords))
        elif isinstance(value, MethodType):
            self.queue.extend((value.__func__, value.__self__))
        elif isinstance(value, FunctionType):
            self.function(value)
        elif isinstance(value, nn.Module):
            self.module(value)
        elif isinstance(value, type):
            self.class_(value)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= MAX_ARRAY_BYTES and not value.dtype.hasobject:
                self.guard.add_array(value)
        elif not isinstance(value, (ModuleType, BuiltinFunctionType, Trace)):
            self.object(value)

    def slots(self, container: Any, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in items:
            if len(self.guard) >= MAX_SLOTS:
                return
            self.guard.add_slot(container, key, value)
            self.queue.append(value)

    def function(self, function: FunctionType) -> None:
        for cell in function.__closure__ or ():
            if (content := _content(cell)) is not _EMPTY:
                self.guard.add_cell(cell)
                self.queue.append(content)
        self.queue.extend(function.__defaults__ or ())
        self.queue.extend((function.__kwdefaults__ or {}).values())
        if _is_library(function.__code__.co_filename):
            return
        if vars(function):
            self.slots(vars(function), list(vars(function).items()))
        namespace, names = function.__globals__, _names(function.__code__)
        for name in names[0]:
            if name not in namespace or _is_of_library(value := namespace[name]):
                continue
            self.slots(namespace, [(name, value)])
            if isinstance(value, ModuleType):  # of the user: what of it the function names
                found = {key: vars(value)[key] for key in names[1] if key in vars(value)}
                self.slots(vars(value), [(k, v) for k, v in found.items() if not _is_of_library(v)])

    def module(self, module: nn.Module) -> None:
        state = vars(module)
        for table in _TABLES:
            self.slots(state.get(table, {}), list(state.get(table, {}).items()))
        for hooks in _HOOKS:
            self.guard.add_size(state[hooks])
        own = {name: value for name, value in state.items() if name not in _OF_MODULES}
        self.attributes(module, state, own)

    def object(self, value: Any) -> None:
        state = getattr(value, "__dict__", None)
        if isinstance(state, dict):
            self.attributes(value, state, state)
        elif not _is_library_class(type(value)):
            self.queue.append(type(value))

    def attributes(self, owner: Any, state: dict[str, Any], own: Mapping[str, Any]) -> None:
        if _is_library_class(type(owner)):
            # What a library keeps under a leading underscore is a cache as often as not.
            self.slots(state, [(k, v) for k, v in own.items() if k[:1] != "_" and _is_state(v)])
            return
        self.guard.add_size(state)
        self.slots(state, list(own.items()))
        self.queue.append(type(owner))

    def class_(self, value: type) -> None:
        for cls in value.__mro__:
            if _is_library_class(cls):
                continue
            state = vars(cls)
            for name, attribute in list(state.items()):
                if isinstance(attribute, property):
                    self.queue.append(attribute.fget)
                elif isinstance(attribute, (staticmethod, classmethod)):
                    self.queue.append(attribute.__func__)
                elif name[:2] != "__" or isinstance(attribute, FunctionType):
                    self.slots(state, [(name, attribute)])


_EMPTY = object()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _item(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except LookupError:
        return _EMPTY


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _all_same(values: Sequence[Any], expected: list[Any]) -> bool:
    if not all(map(_is_same, values, expected)):
        return False
    expected[:] = values  # equal constants, which next time are identical
    return True


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values are one object, equal constants, or the same method of the same object."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return isinstance(a, _CONSTANTS) and bool(a == b)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(width)]


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """The globals and the attributes that a function names, functions within it included."""
    loaded: set[str] = set()
    attributes: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            loaded.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names(constant)
            loaded |= inner[0]
            attributes |= inner[1]
    return loaded, attributes


def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARIES)


def _is_library_class(cls: Any) -> bool:
    return _is_library_module(sys.modules.get(cls.__module__))


def _is_library_module(module: Any) -> bool:
    filename = getattr(module, "__file__", None)
    name = getattr(module, "__name__", "")
    if filename is None:
        return name != "__main__"
    return _is_library(os.path.abspath(filename))


def _is_of_library(value: Any) -> bool:
    """Whether a global is a module, a class or a function of a library, which nobody changes."""
    if isinstance(value, ModuleType):
        return _is_library_module(value)
    if isinstance(value, type):
        return _is_library_class(value)
    if isinstance(value, FunctionType):
        return _is_library(value.__code__.co_filename) and value.__closure__ is None
    return isinstance(value, BuiltinFunctionType)


def _is_state(value: Any) -> bool:
    return not isinstance(value, (MappingProxyType, type, ModuleType))
