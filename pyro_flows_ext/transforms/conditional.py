"""Conditional (amortized) forms: a context decides the parameters of a transform, or joins the input of its networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor

from ..nn import HyperNetwork
from ._constrain import check_event, check_positive
from .base import FlowTransform, forget_param_store


class ConditionalModule(ConditionalTransformModule):
    """A module with `condition(context)` that can be pickled after Pyro's parameter store has seen it."""

    def __getstate__(self) -> dict[str, Any]:
        forget_param_store(self)
        return dict(self.__dict__)


class ConditionalFlow(ConditionalModule):
    """x -> f(x; θ + h(c)): a transform whose parameters are shifted by a network h of the context.

    `condition(context)` with a context `(*, C)` gives a transform of batch shape `(*)`: one set of parameters a
    datum, as in the amortized flows of Rezende & Mohamed (2015) and van den Berg et al. (2018). The
    network's last layer starts at zero, so that training starts from the unconditional transform at its own initial
    value. Raises `ValueError` when the context's last dimension is not `context_dim`.
    """

    def __init__(
        self,
        transform: FlowTransform,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__()
        self.transform = transform
        shapes = {name: p.shape for name, p in transform.named_parameters(recurse=False)}
        self.hyper = HyperNetwork(context_dim, shapes, hidden_dims)

    def condition(self, context: Tensor) -> FlowTransform:
        """The transform for this context: `(*, C)` -> a transform of batch shape `(*)`."""
        offsets = self.hyper(context)
        return self.transform.bind({name: self._shift(name, h) for name, h in offsets.items()})

    def _shift(self, name: str, offset: Tensor) -> Tensor:
        """The parameter θ + h where the network emits h `(*, shape)`."""
        return getattr(self.transform, name) + offset  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform.extra_repr()}, context_dim={self.hyper.context_dim})"


class ContextualFlow(ConditionalModule):
    """x -> f(x; c): a transform whose own networks take the context as a further input.

    `condition(context)` with a context `(*, C)` gives a transform of batch shape `(*)`. The conditional form of the
    families whose parameters already come from a network (coupling, autoregressive). Raises `ValueError` when the
    context's last dimension is not `context_dim`; `options` are those of the transform.
    """

    base: Callable[..., FlowTransform]  # a subclass's, with the keyword `context_dim`
    transform: FlowTransform

    def __init__(
        self,
        input_dim: int | Sequence[int],
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.context_dim = check_positive("context_dim", context_dim)
        self.transform = type(self).base(input_dim, hidden_dims, context_dim=context_dim, **options)

    def condition(self, context: Tensor) -> FlowTransform:
        """The transform for this context: `(*, C)` -> a transform of batch shape `(*)`."""
        check_event("context", context, self.context_dim)
        return self.transform.with_context(context)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.transform.extra_repr()}, context_dim={self.context_dim})"
        )
