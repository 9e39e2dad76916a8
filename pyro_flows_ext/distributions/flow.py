"""`FlowDistribution`: a flow over any base, as a Pyro distribution that is a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor, nn
from torch.distributions import Distribution
from typing_extensions import Self

from ..transforms import ComposeFlow, FlowTransform
from .transformed import TransformedDensity, log_prob_anywhere


class FlowDistribution(TransformedDensity):
    """x = f(z), z ~ base: log p(x) = log p_base(f⁻¹(x)) + log|det Df⁻¹(x)|, exact.

    With a part that depends on a context `(*, C)`, `condition(context)` returns the density at that context, of batch
    shape `(*)`. Any value can be scored. Cost: `rsample` a forward pass, `log_prob` an inverse one, at the last draw
    none.

    Args:
        base: a distribution with fixed parameters, whose rightmost batch dimensions become event dimensions if the
            transform acts on them; or a module whose `forward()` returns one, for a base that learns. With
            `takes_context = True`, `forward(context)` gets the context.
        transforms: a `FlowTransform`, or a sequence of them in the order from base to data.

    Raises:
        TypeError: for a base or a part of another kind.
        ValueError: for a base with parameters that would not train; at calls, for a value of another event shape, and
            without a context where one is needed.

    Example:
        >>> flow = FlowDistribution(dist.Normal(torch.zeros(2), 1.0), nsf(2, context_dim=3))
        >>> flow.condition(torch.zeros(5, 3)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    transform: FlowTransform
    can_standardize = True

    def __init__(
        self,
        base: Distribution | nn.Module,
        transforms: FlowTransform | Sequence[FlowTransform],
        *,
        validate_args: bool | None = None,
    ):
        transform = _compose(transforms)
        super().__init__(base, validate_args)
        self.transform = transform
        if not transform.context_dim or not getattr(base, "takes_context", False):
            self._batch_shape, self._event_shape = self._shapes()

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """The length of the context that `condition` takes; 0 for none, and once conditioned."""
        return self.transform.context_dim

    def condition(self, context: Tensor) -> Self:
        """The density at this context, `(*, C)`: its batch shape is `(*)`, broadcast against the base's."""
        if not self.transform.context_dim:
            return super().condition(context)
        context = self._context_to_layers(context)
        transform = self.transform.condition(context)
        view = self._view(self.batch_shape, transform=transform, context=context)
        view._batch_shape, view._event_shape = view._shapes()
        return view

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `(*sample_shape, *batch_shape, *event_shape)`, independent by row, with a gradient where the base has one."""
        base, transform, _ = self._at_batch()
        return transform(base.rsample(torch.Size(sample_shape)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without a gradient: `(*sample_shape, *batch_shape, *event_shape)`."""
        base, transform, _ = self._at_batch()
        return transform(base.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), exact, in nats: `(*, *event_shape)` -> `(*)`."""
        return self._pull_and_score(value)[1]

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """A draw and its log-density, in one pass."""
        base, transform, outer = self._at_batch()
        z = base.rsample(torch.Size(sample_shape))
        value, ladj = transform.forward_and_ladj(z)
        return value, base.log_prob(z) - sum_rightmost(ladj, outer)

    def _pull_and_score(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """f⁻¹(value) and log p(value), in one pass."""
        self._check_value(value)
        if self._validate_args:
            self._validate_sample(value)
        base, transform, outer = self._at_batch()
        z, ladj = _pull(transform, value)
        return z, log_prob_anywhere(base, z) + sum_rightmost(ladj, outer)

    @property
    def support(self) -> Any:
        if isinstance(self.transform, _Identity) and self.standardization is None:
            return self._base_dist().support
        codomain = self._flow().codomain
        outer = len(self.event_shape) - codomain.event_dim
        return constraints.independent(codomain, outer) if outer else codomain

    def _flow(self) -> FlowTransform:
        if self.transform.context_dim:
            raise ValueError(
                "this density depends on a context: call condition(context) first, with a context of shape "
                f"(*, {self.transform.context_dim})"
            )
        return self.transform if self.standardization is None else self._with_units(self.transform)

    def _layers_codomain(self) -> Any:
        return self.transform.codomain

    def _shapes(self) -> tuple[Size, Size]:
        """Batch and event shape: of the base through the transform."""
        transform = self.transform
        base = self._base_dist(transform.domain.event_dim)
        shape = transform.forward_shape(base.batch_shape + base.event_shape)
        change = transform.codomain.event_dim - transform.domain.event_dim
        cut = len(shape) - len(base.event_shape) - change
        return shape[:cut], shape[cut:]

    def _at_batch(self) -> tuple[Any, FlowTransform, int]:
        """The base at this batch shape, the transform, and how many dimensions of the event are outside the transform's."""
        transform = self.transform
        if transform.context_dim or self.standardization is not None:
            transform = self._flow()
        event_dim = transform.domain.event_dim
        base = self._base_dist(event_dim)
        outer = len(base.event_shape) - event_dim
        if base.batch_shape != self.batch_shape:
            base = base.expand(self.batch_shape)
        return base, transform, outer


class _Identity(FlowTransform):
    """The identity, for events of any shape."""

    domain = codomain = constraints.real

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y, torch.zeros_like(y)


def _pull(transform: FlowTransform, value: Tensor) -> tuple[Tensor, Tensor]:
    """z = f⁻¹(value) and log|det Df⁻¹(value)|: at no cost for the last draw, by one inverse pass otherwise."""
    if (hit := transform._lookup(y=value)) is not None:
        return hit[0], -hit[2]
    return transform.inverse_and_ladj(value)


def _compose(transforms: FlowTransform | Sequence[FlowTransform]) -> FlowTransform:
    if isinstance(transforms, FlowTransform):
        return transforms
    parts = list(transforms)
    if not parts:
        return _Identity()
    for part in parts:
        if not isinstance(part, FlowTransform):
            raise TypeError(f"transforms: expected FlowTransforms, got a {type(part).__name__}")
    return parts[0] if len(parts) == 1 else ComposeFlow(parts)
