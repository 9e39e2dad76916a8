"""`FlowTransform`: two methods to write, everything that Pyro and torch expect of a transform derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from typing_extensions import Self

from .cache import PassCache

_UNSAVED = ("_pass_cache", "_inverse_view")


class FlowTransform(TransformModule):
    """An invertible, differentiable map with parameters: y = f(x), with log|det Df| from the same pass.

    A subclass writes

        forward_and_ladj(x) -> (y, ladj)    # x: (*, D) -> y: (*, D), ladj: (*)
        inverse_and_ladj(y) -> (x, ladj)    # ladj of the inverse map at y: minus the forward one at x

    as pure functions of their argument and the parameters, for any values, drawn by the transform or not. The rest
    follows: `t(x)`, `t.inv(y)` and `t.log_abs_det_jacobian(x, y)` remember their last pass, so that sampling and
    scoring the same value costs one; `t.inv` is a module that shares the parameters, so that either orientation
    trains; and the transform works wherever Pyro or torch takes one (`TransformedDistribution`,
    `ComposeTransformModule`, `AutoNormalizingFlow`, NeuTra).

    `batch_shape` is `()` except for a transform bound to a batch of parameters (see `bind`).
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    batch_shape = torch.Size()
    context_dim = 0  # of the context that its networks take
    context: Tensor | None = None

    def __init__(self) -> None:
        super().__init__(cache_size=1)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y = f(x) and log|det Df(x)|, in one pass."""
        raise TypeError(f"{type(self).__name__} must define forward_and_ladj(x)")

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x = f⁻¹(y) and log|det Df⁻¹(y)|, in one pass."""
        raise TypeError(f"{type(self).__name__} must define inverse_and_ladj(y)")

    # --- the torch.distributions.Transform protocol, through the cache ---

    def __call__(self, x: Tensor) -> Tensor:
        if (hit := self._lookup(x=x)) is not None:
            return hit[1]
        y, ladj = self.forward_and_ladj(x)
        self._store(x, y, ladj, is_forward=True)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        if (hit := self._lookup(y=y)) is not None:
            return hit[0]
        x, ladj = self.inverse_and_ladj(y)
        self._store(y, x, -ladj, is_forward=False)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det Df(x)|, shape `(*)`; free when x and y come from the last pass, one forward pass otherwise."""
        if (hit := self._lookup(x=x, y=y)) is not None:
            return hit[2]
        return self.forward_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant: +1, as every family here that does not say otherwise keeps volume's
        orientation; 0 where it depends on the size of the event."""
        return 1

    @property
    def inv(self) -> FlowTransform:
        """The inverse map as a module over the same parameters; `t.inv.inv is t`."""
        view = self.__dict__.get("_inverse_view")
        if view is None:
            # Not through nn.Module.__setattr__: a registered child that holds its parent would never end state_dict().
            view = self.__dict__["_inverse_view"] = InverseFlow(self)
        return view

    def with_cache(self, cache_size: int = 1) -> Self:
        """This transform: its cache is always on, and safe."""
        return self

    # --- shapes ---

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of f(x) for x of `shape`; a batch of parameters broadcasts."""
        return self._broadcast_shape(shape, self.domain.event_dim)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """The shape of f⁻¹(y) for y of `shape`; a batch of parameters broadcasts."""
        return self._broadcast_shape(shape, self.codomain.event_dim)

    def _broadcast_shape(self, shape: Sequence[int], event_dim: int) -> torch.Size:
        cut = len(shape) - event_dim
        if cut < 0:
            raise ValueError(
                f"{type(self).__name__}: expected {event_dim} event dimensions, got shape {tuple(shape)}"
            )
        batch = torch.broadcast_shapes(tuple(shape[:cut]), self.batch_shape)
        return torch.Size(batch) + torch.Size(shape[cut:])

    # --- parameters of one's own, or somebody else's ---

    def bind(self, tensors: Mapping[str, Tensor]) -> Self:
        """This transform with `tensors` in place of the parameters of the same names, with gradients through them.

        Each tensor has the shape of its parameter behind any number of batch dimensions, which become the
        `batch_shape` of the result; this is how a hyper-network makes one transform per datum.
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
        view = self._view(torch.broadcast_shapes(*batch_shapes), *tensors.values())
        view.__dict__["_parameters"] = {
            k: v for k, v in self._parameters.items() if k not in tensors
        }
        view.__dict__.update(tensors)
        return view

    def with_context(self, context: Tensor) -> Self:
        """This transform with `context` `(*, C)` as an input of its networks, where it has any that take one.

        The leading dimensions become the `batch_shape` of the result; parameters are shared.
        """
        view = self._view(context.shape[:-1], context)
        view.__dict__["context"] = context
        return view

    def _read_context(self) -> Tensor | None:
        """The context for the networks: None where they take none; `ValueError` where one is missing."""
        if not self.context_dim:
            return None
        if self.context is None:
            raise ValueError(
                f"{type(self).__name__}: built with context_dim={self.context_dim}; call condition(context) first"
            )
        return self.context

    def _view(self, batch_shape: torch.Size, *bound: Tensor) -> Self:
        """A shallow copy over the same parameters that depends on the `bound` tensors too."""
        view = object.__new__(type(self))
        view.__dict__.update({k: v for k, v in self.__dict__.items() if k not in _UNSAVED})
        view.__dict__.update(_bound=bound, batch_shape=batch_shape)
        return view

    # --- the cache ---

    def _state(self) -> list[Tensor]:
        """Every tensor that a pass depends on beside its argument."""
        if self._modules:
            state = [*self.parameters(), *self.buffers()]
        else:
            state = [t for t in self._parameters.values() if t is not None]
            state += [t for t in self._buffers.values() if t is not None]
        return [*state, *self.__dict__.get("_bound", ())]

    def _lookup(
        self, x: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if torch.compiler.is_compiling():
            return None
        cache = self.__dict__.get("_pass_cache")
        return None if cache is None else cache.lookup(self, x=x, y=y)

    def _store(self, input: Tensor, output: Tensor, ladj: Tensor, *, is_forward: bool) -> None:
        if not torch.compiler.is_compiling():
            cache = self.__dict__.setdefault("_pass_cache", PassCache())
            cache.store(self, input, output, ladj, is_forward=is_forward)

    def clear_cache(self) -> None:
        """Forgets the last pass; needed only after writing `parameter.data` by hand."""
        if (cache := self.__dict__.get("_pass_cache")) is not None:
            cache.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.clear_cache()  # `.to()` and `.double()` write `.data`, which moves no version
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return {k: v for k, v in self.__dict__.items() if k not in _UNSAVED}

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"{type(self).__name__}({self.extra_repr()}{batch})"


def forget_param_store(module: nn.Module) -> None:
    """Drops the weak references that Pyro's parameter store hangs on a module's parameters, which cannot be pickled.

    The store hangs them on anew at every access.
    """
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


class InverseFlow(FlowTransform):
    """The inverse orientation of a transform, over the same parameters: y = f⁻¹(x). Made by `transform.inv`."""

    def __init__(self, transform: FlowTransform):
        super().__init__()
        self.transform = transform

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(y)

    def bind(self, tensors: Mapping[str, Tensor]) -> FlowTransform:  # type: ignore[override]
        return self.transform.bind(tensors).inv

    def with_context(self, context: Tensor) -> FlowTransform:  # type: ignore[override]
        return self.transform.with_context(context).inv

    # One cache for both orientations: the transform's own.

    def _state(self) -> list[Tensor]:
        return self.transform._state()

    def __call__(self, x: Tensor) -> Tensor:
        return self.transform._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log|det Df⁻¹(x)|: minus the transform's own at (y, x)."""
        return -self.transform.log_abs_det_jacobian(y, x)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.transform.forward_shape(shape)

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return self.transform.codomain

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.transform.domain

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        return self.transform.batch_shape

    @property
    def sign(self) -> int:
        return self.transform.sign

    @property
    def inv(self) -> FlowTransform:
        return self.transform

    def clear_cache(self) -> None:
        self.transform.clear_cache()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.transform.__dict__["_inverse_view"] = self

    def __repr__(self) -> str:
        return f"{self.transform!r}.inv"
