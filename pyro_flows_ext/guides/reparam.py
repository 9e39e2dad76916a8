"""`CircularReparam`: latent angles and directions as vectors of a Euclidean space."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor

from ..programs import CIRCULAR


class CircularReparam(Reparam):
    """Reparametrises a latent angle or direction by a vector x: the site's value is the direction of x.

    For a distribution p of angles, x lies in the plane, θ = atan2(x₂, x₁), and the length of x has a Rayleigh distribution:

        log p(x) = log p(θ(x)) - |x|²/2.

    For one of directions on the sphere in ℝᵈ, θ = x / |x|, and the length has a χ distribution with d degrees of freedom. The
    density is smooth, proper, and normal for uniform θ. The posterior of θ and the evidence stay as they are.

    The auxiliary site is `{name}_vector`, of shape `(*, 2)` for angles of shape `(*)`.

    Raises:
        ValueError: The site is observed.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro import poutine
        >>> from pyro_flows_ext.guides import AutoIAF, CircularReparam
        >>> def model():
        ...     return pyro.sample("angle", dist.VonMises(torch.tensor(3.0), torch.tensor(2.0)))
        >>> model = poutine.reparam(model, config={"angle": CircularReparam()})
        >>> guide = AutoIAF(model)
    """

    def apply(self, msg: Any) -> Any:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        if msg["is_observed"]:
            raise ValueError(
                f"site {name!r}: expected a latent, got an observed site; CircularReparam is for latents alone"
            )
        angles = is_circular(fn)
        vector = pyro.sample(
            f"{name}_vector",
            DirectionalVector(fn),
            obs=None if value is None else _unit_vector(value, angles),
            infer={"is_observed": False},
        )
        if value is None:
            value = _direction(vector, angles)
        event_dim = fn.event_dim
        return {"fn": dist.Delta(value, event_dim=event_dim), "value": value, "is_observed": True}


class DirectionalVector(dist.TorchDistribution):
    """Vectors whose direction follows `fn`, with lengths of independent χ distributions (Rayleigh in the plane)."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, fn: Any):
        self.fn, self.angles = fn, is_circular(fn)
        event = (*fn.event_shape, 2) if self.angles else fn.event_shape
        super().__init__(fn.batch_shape, torch.Size(event), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> DirectionalVector:
        return type(self)(self.fn.expand(batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        unit = _unit_vector(self.fn.sample(sample_shape), self.angles)
        length = torch.randn_like(unit).square().sum(-1, keepdim=True).sqrt()
        return length * unit

    def log_prob(self, value: Tensor) -> Tensor:
        d = value.shape[-1]
        log_lengths = (value.square().sum(-1) + (d - 2) * math.log(2)) / 2 + math.lgamma(d / 2)
        over = len(self.event_shape) - 1
        summed = log_lengths.flatten(log_lengths.dim() - over).sum(-1) if over else log_lengths
        return self.fn.log_prob(_direction(value, self.angles)) - summed


def is_circular(fn: Any) -> bool:
    """Whether a distribution is one of angles."""
    while not isinstance(fn, CIRCULAR) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, CIRCULAR)


def _unit_vector(value: Tensor, angles: bool) -> Tensor:
    return torch.stack([value.cos(), value.sin()], -1) if angles else value


def _direction(vector: Tensor, angles: bool) -> Tensor:
    if angles:
        return torch.atan2(vector[..., 1], vector[..., 0])
    return vector / vector.norm(dim=-1, keepdim=True)
