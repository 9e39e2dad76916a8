"""A device that is none: tensors with values, which refuse operands on the CPU as those on a GPU do.

`with FakeDevice() as device:` makes the device "meta" one with values. A tensor there is a wrapper around one on the CPU. An
operation on tensors of both devices raises, but for the exceptions that GPUs make too: single numbers on the CPU, indices on
the CPU, and copies. Unlike fake tensors, values can be read: chains, weights and losses run as they do on a GPU.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
DEVICE = torch.device("meta")
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
# A number on the CPU is an operand of these no more than a vector is.
STRICT = {aten.cat.default, aten.stack.default, aten.index_select.default, aten.gather.default}


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


class OnDevice(Tensor):
    """A tensor on the fake device, with its values in `values`."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        self: Any = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=DEVICE,
        )
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    # Modules do not load states into meta tensors, which have no values.
    is_meta = False

    def tolist(self) -> Any:
        return self.values.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Files of a GPU are read with map_location="cpu".
        return self.values.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Generator(torch.Generator):
    """Takes the fake device too."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu" if torch.device(device) == DEVICE else device)


class _FromPython(TorchFunctionMode):
    """Tensors of Python numbers on the fake device, which torch would leave without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in FROM_PYTHON:
            device = kwargs.get("device")
            if func is Tensor.new_tensor and device is None:
                device = args[0].device
            if device is not None and torch.device(device) == DEVICE:
                if func is Tensor.new_tensor:
                    kwargs = {"dtype": args[0].dtype, **kwargs}
                    func, args = torch.tensor, args[1:]
                requires_grad = kwargs.pop("requires_grad", False)
                new = func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
                return new.requires_grad_() if requires_grad else new
        return func(*args, **kwargs)


class FakeDevice(TorchDispatchMode):
    """Makes factories with `device=DEVICE` return tensors with values, within a `with` block."""

    def __enter__(self) -> Any:
        self.patches = [
            mock.patch.object(torch, "Generator", Generator),
            mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        ]
        for patch in self.patches:
            patch.start()
        self.functions = _FromPython()
        self.functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.functions.__exit__(*exc)
        for patch in self.patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the values; its results are on the device of its operands."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    here = any(isinstance(t, OnDevice) for t in tensors)
    if here and func not in COPIES:
        _check(func, args, tensors)
    device = kwargs.get("device")
    if device is not None:
        here = torch.device(device) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu") if here else device}
    elif func is aten.copy_.default:
        here = isinstance(args[0], OnDevice)
    inner_args, inner_kwargs = tree_map_only(OnDevice, lambda t: t.values, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if not here:
        return out
    out = tree_map_only(Tensor, OnDevice, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raises where operands are on the CPU."""
    elsewhere = [t for t in tensors if not isinstance(t, OnDevice)]
    if func in INDEXING and isinstance(args[0], OnDevice):
        values = args[2:3] if len(args) > 2 else []
        elsewhere = [t for t in values if isinstance(t, Tensor) and not isinstance(t, OnDevice)]
    mixed = [t for t in elsewhere if t.dim() > 0 or func in STRICT]
    if mixed:
        shapes = [tuple(t.shape) for t in mixed]
        raise MixedDevices(
            f"{func}: operands of shapes {shapes} are on the CPU, others on {DEVICE}"
        )
