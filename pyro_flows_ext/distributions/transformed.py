"""Densities whose draws are transformed draws of a base distribution, fixed or learned."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Independent
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to

from ..ops import broadcast_shapes, not_a_tensor
from ..transforms import Standardize
from .base import Density, is_real
from .tensors import map_tensors


class TransformedDensity(Density):
    """A density whose draws are transformed draws of `base`.

    Args:
        base: a distribution with fixed parameters; or a module whose `forward()` returns a distribution, for a base
            that learns and is saved. With `takes_context = True`, `forward(context)` gets the context of the density.

    Raises:
        TypeError: for a base of another kind.
        ValueError: for a distribution with parameters that require a gradient, which would not train.
    """

    base: Distribution | nn.Module
    context_standardization: Standardize | None

    def __init__(self, base: Distribution | nn.Module, validate_args: bool | None = None):
        if not isinstance(base, Distribution | nn.Module):
            raise TypeError(
                f"base: expected a distribution, or a module that returns one, got a {type(base).__name__}"
            )
        if isinstance(base, Distribution) and not isinstance(base, nn.Module):
            _check_fixed(base)
        super().__init__(validate_args=validate_args)
        self.base = base
        self.context: Tensor | None = None
        self.register_module("context_standardization", None)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return bool(self._base_dist().has_rsample)

    def standardize_context(self, loc: Tensor, scale: Tensor) -> None:
        """Sets the units of contexts in place: the layers get (context - loc) / scale, both `(context_dim)`.

        Raises:
            ValueError: the density takes no context, or the values do not fit.
        """
        if not self.context_dim or loc.shape != (self.context_dim,):
            raise ValueError(
                f"standardize_context: expected loc and scale of shape ({self.context_dim},) for context_dim = "
                f"{self.context_dim}, got {tuple(loc.shape)}"
            )
        some = next(self.parameters(), torch.empty(0))
        self.context_standardization = Standardize(loc.to(some), scale.to(some), 1)

    def _context_to_layers(self, context: Tensor) -> Tensor:
        """A context in the units of the layers."""
        if not isinstance(context, Tensor):
            raise not_a_tensor("context", context)
        if self.context_standardization is None:
            return context
        return self.context_standardization.forward_and_ladj(context)[0]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        loc = state_dict.get(f"{prefix}context_standardization.loc")
        if loc is not None and self.context_standardization is None and self.context_dim:
            self.standardize_context(torch.zeros_like(loc), torch.ones_like(loc))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _base_dist(self, event_dim: int = 0) -> Any:
        """The base's current distribution, with rightmost batch dimensions declared events until it has `event_dim`."""
        base: Any = self.base
        if not isinstance(base, Distribution):
            base = base(self.context) if getattr(base, "takes_context", False) else base()
        missing = event_dim - len(base.event_shape)
        if missing > len(base.batch_shape):
            raise ValueError(
                f"base: expected draws of at least {event_dim} dimensions, got shape "
                f"{tuple(base.batch_shape + base.event_shape)}"
            )
        return Independent(base, missing) if missing > 0 else base


def log_prob_anywhere(base: Distribution, z: Tensor) -> Tensor:
    """log p(z) for any z: -inf outside of the support, where torch's distributions raise or return NaN."""
    if not z.numel():  # torch cannot sum a tensor without elements over the event
        batch = z.shape[: z.dim() - len(base.event_shape)]
        return z.new_zeros(broadcast_shapes(batch, base.batch_shape))
    support: Any = base.support
    if is_real(support):
        return base.log_prob(z)
    inside = support.check(z)
    safe = biject_to(support)(torch.zeros_like(z))
    mask = inside.reshape(inside.shape + (1,) * len(base.event_shape))
    return torch.where(inside, base.log_prob(torch.where(mask, z, safe)), -torch.inf)


def _check_fixed(base: Distribution) -> None:
    """Raises `ValueError` for parameters inside a plain distribution, which no optimizer would train."""

    def check(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            raise ValueError(
                "base: expected fixed parameters, got ones that require a gradient; a distribution is no module, so they would "
                "neither train nor be saved. Pass a module whose forward() returns the distribution"
            )
        return tensor

    map_tensors(base, check)
