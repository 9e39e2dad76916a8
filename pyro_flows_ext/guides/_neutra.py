"""`pyro.infer.reparam.NeuTraReparam` with latents in plates."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from ..programs import Latent
from ..programs.supports import ImageConstraint
from ..transforms import FlowTransform


def called_by_neutra(depth: int = 2) -> bool:
    """Whether a `NeuTraReparam` calls the method, which adds log|det| to each entry of a plate.

    Other callers expect the log|det| of the flow, and the arguments of the call are the same.
    """
    return isinstance(sys._getframe(depth).f_locals.get("self"), NeuTraReparam)


def for_neutra(flow: FlowTransform, latents: Sequence[Latent], sites: dict[str, Any]) -> Transform:
    """The flow whose log|det| `NeuTraReparam` counts once; raises `ValueError` for latents where it cannot."""
    for latent in latents:
        scale = torch.as_tensor(sites[latent.name]["scale"])
        reason = None
        if isinstance(latent.support, ImageConstraint):
            reason = f"the support {latent.support} of a transformed, bounded distribution"
        elif not bool((scale == 1).all()):
            reason = "a scale, which would multiply the Jacobian too"
        elif sites[latent.name]["mask"] is not None:
            reason = "a mask, which would hide the Jacobian too"
        if reason is not None:
            raise ValueError(
                f"NeuTraReparam: latent {latent.name!r} has {reason}: expected latents without. Use "
                "pyro_flows_ext.infer.fit with this guide, whose result refines its draws by HMC in the coordinates of the flow"
            )
    first = latents[0]
    batch = first.shape[: len(first.shape) - first.event_dim]
    return _OverPlates(flow, batch) if batch.numel() > 1 else flow


class _OverPlates(Transform):
    """A flow whose log|det| is that of the first entry of the plates of a site, and 0 for the other entries."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: FlowTransform, batch: torch.Size):
        super().__init__()
        self.flow, self.batch = flow, batch

    def _call(self, x: Tensor) -> Tensor:
        return self.flow(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow.inv(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        ladj = self.flow.log_abs_det_jacobian(x, y)
        first = torch.zeros(self.batch.numel(), dtype=ladj.dtype, device=ladj.device)
        first[0] = 1.0
        return ladj * first.reshape(self.batch)
