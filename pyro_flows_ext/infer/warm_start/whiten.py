"""`warm_start`: a guide placed on the Gaussian that is found for its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...guides.base import FlowGuide
from ...programs import ERRORS, LogJoint, Program
from .gaussian import DenseGaussian
from .search import SPREAD, WarmStart, find_gaussian

# Draws of the prior and points around the start from which modes are searched.
NUM_PRIOR, NUM_AROUND = 4, 3


def warm_start(
    model: Program,
    guide: FlowGuide,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
) -> WarmStart:
    """Finds a Gaussian near the posterior and whitens `guide` with it, so that the flow trains on what is left.

    See `find_gaussian` for the search. Sets the guide up where it is not.

    Args:
        model: a Pyro model.
        guide: a flow guide over its latents.
        args, model_kwargs: the model's arguments.

    Returns:
        The Gaussian, what each recipe was worth, and the modes found on the way.

    Raises:
        TypeError: for a guide that cannot be whitened.
        ValueError: if no candidate has a finite ELBO.

    Example:
        >>> model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        >>> found = warm_start(model, AutoIAF(model))
        >>> found.name in found.elbos
        True
    """
    if not isinstance(guide, FlowGuide):
        raise TypeError(
            f"guide: expected a flow guide over all latents, such as AutoIAF, got a {type(guide).__name__}"
        )
    kwargs = dict(model_kwargs or {})
    if guide.prototype_trace is None:
        guide.setup(*args, **kwargs)
    return whiten_at_posterior(LogJoint(model, args, kwargs, latents=guide.latents), guide)


def whiten_at_posterior(log_joint: LogJoint, guide: FlowGuide) -> WarmStart:
    """`warm_start` of a guide that is set up, on the log joint of its latents."""
    whitening = guide.whitening
    start = DenseGaussian(whitening.loc.clone(), whitening.scale_tril.clone())
    found = find_gaussian(log_joint, start, overdispersed=_overdispersed(log_joint, start.loc))
    guide.whiten(found.gaussian.loc, found.gaussian.scale_tril)
    return found


def _overdispersed(log_joint: LogJoint, loc: Tensor) -> Tensor:
    """Points from which modes are searched: where the prior draws, and around the start, as wide as Stan's."""
    around = loc + SPREAD * (2 * torch.rand(NUM_AROUND, len(loc)).to(loc) - 1)
    try:
        drawn = log_joint.draw_prior(NUM_PRIOR)
    except ERRORS:  # improper priors cannot be drawn from, and a model may reject its own draws
        return around
    return torch.cat([drawn.to(loc), around])
