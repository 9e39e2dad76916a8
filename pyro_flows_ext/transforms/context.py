"""Transforms that depend on a context: `condition`, hyper-networks, and views with tensors in place of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..nn import HyperNetwork
from ..ops import broadcast_shapes, check_context_dim, check_event, check_same_dtype
from .cache import UNSAVED

if TYPE_CHECKING:
    from .base import FlowTransform


class ContextModule(nn.Module):
    """The part of `FlowTransform` for contexts; see there for the attributes."""

    batch_shape = torch.Size()
    context_dim = 0
    context: Tensor | None = None

    def condition(self, context: Tensor) -> Self:
        """Returns the transform at a context.

        Args:
            context: `(*, context_dim)`; its leading dimensions become the `batch_shape` of the result.

        Returns:
            A transform over the same parameters, with `context_dim` 0; the transform itself where it depends on
            no context.

        Raises:
            ValueError: if the last dimension of `context` is not `context_dim`.
        """
        if not self.context_dim:
            return self
        check_event("context", context, self.context_dim)
        if not torch.compiler.is_compiling():
            check_same_dtype("context", context, next(self.parameters(), context))
        hyper = self._modules.get("hyper")
        if hyper is not None:
            bound = {name: self._shifted(name, h) for name, h in hyper(context).items()}
            return self.bind(bound)
        view = self._view(context.shape[:-1], *self.__dict__.get("_bound", ()), context)
        view.__dict__.update(context=context, context_dim=0)
        return view

    def add_hyper_network(self, context_dim: int, hidden_dims: Sequence[int] | None = None) -> None:
        """Lets the parameters of this transform depend on a context c: θ + h(c), h a multilayer perceptron.

        To be called at the end of a subclass's `__init__`. The last layer of h starts at zero, so that the
        transform starts as the unconditional one. Does nothing for `context_dim` 0.

        Args:
            context_dim: number of context variables.
            hidden_dims: widths of the hidden layers of h; `(64, 64)` by default.

        Raises:
            ValueError: if `context_dim` is negative, or is 0 and `hidden_dims` is given.
        """
        self.context_dim = check_context_dim(context_dim)
        if self.context_dim:
            shapes = {name: p.shape for name, p in self.named_parameters(recurse=False)}
            self.hyper = HyperNetwork(self.context_dim, shapes, hidden_dims)
        elif hidden_dims is not None:
            raise ValueError(
                f"hidden_dims: expected None where context_dim is 0, got {hidden_dims!r}; these are the widths of the "
                "network that reads a context, give context_dim too"
            )

    def _shifted(self, name: str, offset: Tensor) -> Tensor:
        """The parameter θ + h where the hyper-network emits h `(*, shape)`."""
        return getattr(self, name) + offset

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """Returns this transform with tensors in place of some of its parameters, with gradients through them.

        Args:
            tensors: by parameter name, tensors of shape `(*, shape of the parameter)`; the broadcast leading
                dimensions become the `batch_shape` of the result.

        Raises:
            ValueError: if a tensor does not end in the shape of its parameter.
        """
        batch_shapes = []
        for name, tensor in tensors.items():
            shape = self._parameters[name].shape  # type: ignore[union-attr]
            cut = tensor.dim() - len(shape)
            if cut < 0 or tensor.shape[cut:] != shape:
                raise ValueError(
                    f"{name}: expected shape (*, {', '.join(map(str, shape))}), got {tuple(tensor.shape)}"
                )
            batch_shapes.append(tensor.shape[:cut])
        view = self._view(broadcast_shapes(*batch_shapes), *tensors.values())
        view.__dict__["_parameters"] = {
            k: v for k, v in self._parameters.items() if k not in tensors
        }
        view.__dict__["_modules"] = {k: v for k, v in self._modules.items() if k != "hyper"}
        view.__dict__.update(tensors, context_dim=0)
        return view

    def _view(self, batch_shape: torch.Size, *bound: Tensor) -> Self:
        """A shallow copy over the same parameters that depends on the `bound` tensors too."""
        view = object.__new__(type(self))
        view.__dict__.update({k: v for k, v in self.__dict__.items() if k not in UNSAVED})
        view.__dict__.update(_bound=bound, batch_shape=batch_shape)
        return view

    def _with_modules(self, batch_shape: torch.Size, **modules: nn.Module) -> Self:
        """A shallow copy with some children replaced by ones that need no context any more."""
        view = self._view(batch_shape)
        view.__dict__["_modules"] = {**self._modules, **modules}
        view.__dict__["context_dim"] = 0
        return view


def common_context_dim(parts: Iterable[FlowTransform]) -> int:
    """Returns the `context_dim` of the parts that depend on a context, 0 if none does.

    Raises:
        ValueError: if two parts expect contexts of different sizes.
    """
    sizes = {part.context_dim for part in parts} - {0}
    if len(sizes) > 1:
        raise ValueError(
            f"parts: expected one context_dim for all parts that take a context, got {sorted(sizes)}"
        )
    return sizes.pop() if sizes else 0
