"""The tails of a guide: the base distribution of its flow, and the layers between the flow and the unconstrained latents."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from ..transforms import ElementwiseAffine, FlowTransform, SinhArcsinh, Whitening

# With a normal base the tails of a flow are thinner than those of most posteriors: importance weights are then unbounded, and
# k-hat is high although all draws but a few count alike. Student's t with 30 degrees of freedom bounds the weights, at a cost
# of .001 nats a coordinate.
BASE_DF = 30.0


def base_distribution(df: float, like: Tensor) -> dist.TorchDistribution:
    """Independent coordinates of mean 0 and variance 1, `(D,)` as `like`: Student's t, or normal for `df=math.inf`."""
    zeros = torch.zeros_like(like)
    if math.isinf(df):
        return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
    scale = math.sqrt(1 - 2 / df)
    dfs, scales = (torch.full_like(zeros, value) for value in (df, scale))
    return dist.StudentT(dfs, zeros, scales).to_event(1)


def layers_behind(loc: Tensor, scale: float) -> list[FlowTransform]:
    """Learned tails and skewness, location and scale by coordinate, and the whitening at `loc` `(D,)` with `scale`."""
    D = len(loc)
    return [SinhArcsinh(D), ElementwiseAffine(D), whitening_at(loc, scale)]


def whitening_at(loc: Tensor, scale: float) -> Whitening:
    """The fixed map x -> loc + scale · x, `(D,)`."""
    return Whitening(loc, scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device))
