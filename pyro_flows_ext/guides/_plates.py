"""The plates of latents of a guide over all latents: those that take all data, in one order."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample


class PlateReader(Messenger):
    """Records which rows the plates of latents take in a run of a model.

    `chosen`: plates with rows by `subsample=`; `moved`: latent -> its plate, where the rows are not all in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: set[str] = set()
        self.moved: dict[str, str] = {}
        self._by_default: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["value"] is None:
                self._by_default.add(msg["name"])
            return
        if msg["is_observed"]:
            return
        # poutine.block may hide the site of a plate, but not the plate on the stack.
        for plate in _PYRO_STACK:
            if not isinstance(plate, SubsampleMessenger) or plate.size < 0:
                continue
            if plate.name not in self._by_default:
                self.chosen.add(plate.name)
                rows = torch.as_tensor(plate.indices)
                if not torch.equal(rows, torch.arange(plate.size, device=rows.device)):
                    self.moved[msg["name"]] = plate.name


def check_plates(trace: Trace, plates: PlateReader) -> None:
    """Raises `ValueError` for a latent of a plate that takes a part of its data, or takes them in another order."""
    way_out = "Use AutoAmortizedFlow, which infers the latents of a datum from the datum, or the full data"
    for name, site in trace.iter_stochastic_nodes():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"latent {name!r} is local to plate {frame.name!r}, which subsamples {frame.size} of "
                    f"{frame.full_size}: one flow over all latents would reuse the same {frame.size} values for "
                    f"every mini-batch. {way_out}"
                )
        if name in plates.moved:
            raise ValueError(
                f"latent {name!r} is local to plate {plates.moved[name]!r}, which is given its rows by subsample=, in another "
                "order or more than once: expected all rows in their order, since one flow over all latents has one posterior "
                f"for each position. {way_out}"
            )
