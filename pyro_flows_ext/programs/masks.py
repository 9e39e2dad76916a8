"""Masked latents: entries whose density the model leaves out."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent

from .traces import Site


def is_maskable(site: Site) -> bool:
    """Whether a mask or a scale of tensors, or a masked distribution, acts on a site."""
    mask, scale = site["mask"], site["scale"]
    own = mask is False or isinstance(mask, Tensor) or isinstance(scale, Tensor) or scale == 0
    return own or _has_mask(site["fn"])


def is_masked(site: Site) -> bool:
    """Whether some entry of a site is masked now."""
    return not bool(_kept(site).all()) or _masks_within(site["fn"])


def masked_entries(site: Site) -> Tensor:
    """The entries of a site's value whose density is left out, broadcastable to the value."""
    event_dim = site["fn"].event_dim
    kept = _kept(site)
    kept = kept.reshape(kept.shape + (1,) * event_dim)
    fn = site["fn"]
    while isinstance(fn, (Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            mask = torch.as_tensor(fn._mask, device=kept.device)
            kept = kept & mask.reshape(mask.shape + (1,) * fn.event_dim)
        fn = fn.base_dist
    return ~kept


def completing_log_prob(site: Site) -> Tensor:
    """The log-density that the prior of a site has where the model leaves it out: 0 for the other entries, `(*batch)`."""
    fn, value = site["fn"], site["value"]
    full = unmasked(fn).log_prob(value)
    return full - torch.where(_kept(site), fn.log_prob(value), torch.zeros_like(full))


def unmasked(fn: Any) -> Any:
    """A distribution without the masks within it."""
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        return unmasked(fn.base_dist).expand(fn.batch_shape)
    return fn


def _kept(site: Site) -> Tensor:
    """Where neither the mask nor a scale of zero of a site leaves its density out."""
    mask, scale = site["mask"], site["scale"]
    kept = torch.as_tensor(True if mask is None else mask, device=site["value"].device)
    if isinstance(scale, Tensor) or scale == 0:
        kept = kept & (torch.as_tensor(scale, device=kept.device) != 0)
    return kept


def _has_mask(fn: Any) -> bool:
    while not isinstance(fn, dist.MaskedDistribution):
        if not isinstance(fn, (Independent, dist.ExpandedDistribution)):
            return False
        fn = fn.base_dist
    return True


def _masks_within(fn: Any) -> bool:
    while isinstance(fn, (Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        if isinstance(fn, dist.MaskedDistribution) and not bool(torch.as_tensor(fn._mask).all()):
            return True
        fn = fn.base_dist
    return False
