"""Densities of angles: on the circle, and on tori."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributions import Distribution

from ..distributions import FlowDistribution, UniformAngles
from .recipe import exact, read_size, recorded


@recorded
def CircularNSF(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    base: Distribution | nn.Module | None = None,
    *,
    num_bins: int = 8,
    **options: Any,
) -> FlowDistribution:
    """Neural spline flow of D angles in [-π, π): circular splines, continuous at ±π. Exact.

    Other angles are refused where values are checked: `ops.wrap` takes the turns off.

    Args:
        event_shape: D or `(D,)`.
        context_dim, num_layers, hidden_dims: as in `NSF`.
        base: of angles; uniform by default.
        num_bins: as in `transforms.CircularSpline`.
        options: as in `transforms.circular_nsf`.

    Example:
        >>> flow = pf.flows.CircularNSF(2)
        >>> flow.log_prob(flow.sample((5,))).shape
        torch.Size([5])

    References:
        Rezende et al. 2020, Normalizing Flows on Tori and Spheres.
    """
    return exact(
        "circular-nsf",
        event_shape,
        UniformAngles(read_size(event_shape)) if base is None else base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        num_bins=num_bins,
        **options,
    )
