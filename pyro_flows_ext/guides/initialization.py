"""Where guides begin before anything is known of the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import initialization
from torch import Tensor
from torch.distributions import transform_to

from ..programs import SPHERICAL, bijection, support_of, tensors_of


def init_to_median(site: Mapping[str, Any]) -> Tensor:
    """The prior's median, by Pyro's function of this name.

    For a prior without a sampler, the image of zero in its support, or any direction on a sphere.
    """
    fn, support, refusal = site["fn"], None, None
    try:
        support = support_of(site["name"], fn)
    except ValueError as error:
        refusal = error  # final unless a reparametriser takes the latent away
    try:
        value = initialization.init_to_median(site)
    except NotImplementedError:
        value = None
    if support is None:
        if value is not None:
            return value
        if isinstance(fn, SPHERICAL):
            return transform_to(fn.support)(_zeros(fn, fn.shape()) + 1)  # type: ignore[no-any-return]
        raise refusal  # type: ignore[misc]
    if value is None or not bool(support.check(value).all()):
        constrain = bijection(support)
        value = constrain(_zeros(fn, constrain.inverse_shape(fn.shape())))
    return value


def _zeros(fn: Any, shape: Any) -> Tensor:
    """Zeros of the dtype and device of a distribution's parameters."""
    like = next((t for t in tensors_of(fn) if t.is_floating_point()), torch.zeros(()))
    return like.new_zeros(shape)
