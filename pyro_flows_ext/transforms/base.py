"""`FlowTransform`: two methods to write; everything that Pyro and torch expect of a transform is derived from them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from typing_extensions import Self

from ..ops import broadcast_shapes, check_event, check_same_dtype
from .cache import UNSAVED, PassCache, find_state
from .context import ContextModule
from .scores import by_jacobian, residual

# The constraint of images (C, H, W).
IMAGE = constraints.independent(constraints.real, 3)


class FlowTransform(ContextModule, TransformModule, ConditionalTransformModule):
    """An invertible, differentiable map with parameters: y = f(x), and log|det Df(x)| from the same pass.

    A subclass writes

        forward_and_ladj(x) -> (y, ladj)    # x: (*, D) -> y: (*, D), ladj: (*)
        inverse_and_ladj(y) -> (x, ladj)    # ladj of the inverse map at y: minus the forward one at x

    as pure functions of their argument and the parameters. `t(x)`, `t.inv(y)` and `t.log_abs_det_jacobian(x, y)`
    reuse the last pass, so that sampling and scoring the same value costs one. `t.inv` is a module over the same
    parameters. A `FlowTransform` works wherever Pyro or torch takes a transform or a conditional transform.

    A transform with `context_dim` C > 0 depends on a context: `t.condition(context)` returns the transform at a
    context `(*, C)`, of batch shape `(*)`. Without a context, `condition` returns the transform itself. A subclass
    calls `add_hyper_network` to let its parameters depend on the context, or reads `self.context` in its networks.

    Attributes:
        domain, codomain: constraints of the input and the output.
        batch_shape: `()` except for a transform at a batch of contexts or parameters (see `bind`).
        context_dim: number of context variables that `condition` expects; 0 for none, and once conditioned.
        context: the context `(*, C)` of a conditioned transform whose networks read one.
        carries_scores: True if `forward_and_score` costs a few passes; otherwise it takes D backward passes.
        inverts_iteratively: True if drawing and scoring in one of the two directions takes sweeps or root finding.
    """

    domain: Constraint = constraints.real_vector
    codomain: Constraint = constraints.real_vector
    bijective = True
    input_dim: Any
    inverts_iteratively = False
    carries_scores = False

    def __init__(self) -> None:
        super().__init__(cache_size=1)

    @abstractmethod
    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y = f(x) `(*, D)` and log|det Df(x)| `(*)`, in one pass."""

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x = f⁻¹(y) `(*, D)` and log|det Df⁻¹(y)| `(*)`, in one pass."""
        raise NotImplementedError(
            f"{type(self).__name__}: expected a subclass with an inverse, got one without; define inverse_and_ladj(y)"
        )

    def forward_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The forward pass of draws, with the score of their density along: see `transforms.scores`.

        Args:
            x: `(*, D)`, requiring a gradient.
            score: ∂ log q(x) / ∂x `(*, D)`, detached.

        Returns:
            y and log|det|, with their graphs, and ∂ log q(y) / ∂y `(*, D)`, detached. By default from the Jacobian, D
            backward passes in one batch.
        """
        y, ladj = self.forward_and_ladj(x)
        return y, ladj, by_jacobian(x, y, residual(x, ladj, score))

    def _check_input(self, name: str, x: Tensor) -> None:
        """Raises `ValueError` unless x is `(*, input_dim)`, of the parameters' dtype, and no context is missing."""
        if self.context_dim:
            raise ValueError(
                f"{type(self).__name__}: expected a call of condition(context) first, with a context of shape "
                f"(*, {self.context_dim}), got none"
            )
        check_event(name, x, self.input_dim)
        # Dynamo cannot trace a walk over the parameters.
        if not torch.compiler.is_compiling() and x.dtype is not next(self.parameters(), x).dtype:
            check_same_dtype(name, x, next(self.parameters()))
        if self.batch_shape:
            self._broadcast_shape(x.shape, self.domain.event_dim)

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
        """Returns log|det Df(x)| `(*)`: at no cost if x and y come from the last pass, by a forward pass otherwise."""
        if (hit := self._lookup(x=x, y=y)) is not None:
            return hit[2]
        return self.forward_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    @property
    def sign(self) -> int:
        """The sign of the Jacobian determinant: +1 unless overridden, 0 if it is not known."""
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
        """Returns this transform: its cache is always on, and safe."""
        return self

    # --- shapes ---

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Returns the shape of f(x) for x of `shape`, broadcast against `batch_shape`."""
        return self._broadcast_shape(shape, self.domain.event_dim)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Returns the shape of f⁻¹(y) for y of `shape`, broadcast against `batch_shape`."""
        return self._broadcast_shape(shape, self.codomain.event_dim)

    def _broadcast_shape(self, shape: Sequence[int], event_dim: int) -> torch.Size:
        cut = len(shape) - event_dim
        if cut < 0:
            raise ValueError(
                f"{type(self).__name__}: expected {event_dim} event dimensions, got shape {tuple(shape)}"
            )
        try:
            batch = broadcast_shapes(tuple(shape[:cut]), self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"{type(self).__name__}: expected a batch that broadcasts against {tuple(self.batch_shape)}, the batch "
                f"shape of the context or of the parameters, got {tuple(shape[:cut])}"
            ) from None
        return torch.Size(batch) + torch.Size(shape[cut:])

    # --- the cache ---

    def _state(self) -> list[Tensor]:
        """Every tensor that a pass depends on beside its argument."""
        return find_state(self)

    def _lookup(
        self, x: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        cache = self.__dict__.get("_pass_cache")
        if cache is None or torch.compiler.is_compiling():
            return None
        return cache.lookup(self, x=x, y=y)

    def _store(self, input: Tensor, output: Tensor, ladj: Tensor, *, is_forward: bool) -> None:
        if not torch.compiler.is_compiling():
            cache = self.__dict__.get("_pass_cache")
            if cache is None:
                cache = self.__dict__["_pass_cache"] = PassCache()
            cache.store(self, input, output, ladj, is_forward=is_forward)

    def clear_cache(self) -> None:
        """Drops the last pass; needed only after a write to `parameter.data` by hand."""
        if (cache := self.__dict__.get("_pass_cache")) is not None:
            cache.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.clear_cache()  # `.to()` and `.double()` write `.data`, which moves no version
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return {k: v for k, v in self.__dict__.items() if k not in UNSAVED}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(filter(None, self._repr_parts()))})"

    def _repr_parts(self) -> Iterable[str]:
        yield self.extra_repr()
        if self.context_dim:
            yield f"context_dim={self.context_dim}"
        if self.batch_shape:
            yield f"batch_shape={tuple(self.batch_shape)}"


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
        self.context_dim, self.batch_shape = transform.context_dim, transform.batch_shape

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(y)

    def bind(self, tensors: Mapping[str, Tensor]) -> FlowTransform:  # type: ignore[override]
        return self.transform.bind(tensors).inv

    def condition(self, context: Tensor) -> FlowTransform:  # type: ignore[override]
        return self.transform.condition(context).inv

    # One cache for both orientations: the transform's own.

    def _state(self) -> list[Tensor]:
        return self.transform._state()

    def _lookup(
        self, x: Tensor | None = None, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        hit = self.transform._lookup(x=y, y=x)
        return None if hit is None else (hit[1], hit[0], -hit[2])

    def __call__(self, x: Tensor) -> Tensor:
        return self.transform._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.transform(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log|det Df⁻¹(x)|: minus that of the transform at (y, x)."""
        return -self.transform.log_abs_det_jacobian(y, x)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.transform.inverse_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.transform.forward_shape(shape)

    @constraints.dependent_property
    def domain(self) -> Constraint:
        return self.transform.codomain

    @constraints.dependent_property
    def codomain(self) -> Constraint:
        return self.transform.domain

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
