"""Where guides begin before anything is known of the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import initialization
from torch import Tensor
from torch.distributions import biject_to


def init_to_median(site: Mapping[str, Any]) -> Tensor:
    """The prior's median, as Pyro's function of this name has it; for a prior that cannot be drawn from, as an improper one,
    the image of zero in its support, where Pyro's raises."""
    try:
        return initialization.init_to_median(site)
    except NotImplementedError:
        constrain = biject_to(site["fn"].support)
        return constrain(torch.zeros(constrain.inverse_shape(site["fn"].shape())))
