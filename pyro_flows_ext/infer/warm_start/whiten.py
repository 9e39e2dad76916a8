"""`warm_start`: a guide placed on the Gaussian that is found for its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...guides.base import FlowGuide
from ...programs import LogJoint, Program
from .gaussian import DenseGaussian
from .search import WarmStart, find_gaussian


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
    target = LogJoint(model, args, kwargs, latents=guide.latents)
    whitening = guide.whitening
    start = DenseGaussian(whitening.loc.clone(), whitening.scale_tril.clone())
    found = find_gaussian(target, start)
    guide.whiten(found.gaussian.loc, found.gaussian.scale_tril)
    return found
