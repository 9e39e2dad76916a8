"""Mini-batches of plates with `subsample_size`, drawn in time of the mini-batch where the data are many."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

# A permutation of all data takes longer than a step of most guides from so many data on, of which a mini-batch takes at
# most one in `SPARSE`.
MANY_DATA, SPARSE = 65_536, 8


class SparseSubsample(Messenger):
    """Draws the indices of small mini-batches of many data in time of the mini-batch; Pyro's plate permutes all data."""

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["value"] is None:
            msg["value"] = draw_subsample(msg["fn"])


def draw_subsample(fn: Any) -> Tensor:
    """The indices of a mini-batch, from the distribution of a plate's site: by `distinct` where that is faster."""
    size = fn.subsample_size
    if fn.use_cuda or size is None or fn.size < MANY_DATA or size * SPARSE > fn.size:
        return fn()
    return distinct(fn.size, size, fn.device)


def distinct(num: int, size: int, device: Any = None) -> Tensor:
    """`size` different integers below `num`, which is many times larger, in random order.

    Of twice as many draws the repeated ones are left out; shapes are fixed, so that this traces. Enough are different but for
    a probability below 1e-14 from `MANY_DATA` on.
    """
    drawn = torch.randint(num, (2 * size,), device=device).sort().values
    keys = torch.rand(2 * size, device=device)
    repeated = torch.cat([drawn.new_zeros(1, dtype=torch.bool), drawn[1:] == drawn[:-1]])
    return drawn[torch.where(repeated, 2.0, keys).argsort()[:size]]
