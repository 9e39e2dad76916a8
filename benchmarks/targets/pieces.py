"""What the models share: double numbers, improper priors, and how a vector-valued function fills a plate."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

# Pyro turns Python numbers into the default dtype, which is not ours.
f64 = partial(torch.tensor, dtype=torch.float64)


def flat(start: dist.TorchDistribution) -> dist.TorchDistribution:
    """The improper prior 1 on the support of `start`, which only says where guides start (Pyro's `mask(False)`)."""
    return start.mask(False)


def flat_real(size: int) -> dist.TorchDistribution:
    """The improper prior 1 on R^size."""
    return flat(dist.Normal(f64(0.0), f64(1.0)).expand([size]).to_event(1))


def flat_positive(*size: int) -> dist.TorchDistribution:
    """The improper prior 1 on the positive numbers: a scalar, or an event of `size`."""
    return flat(dist.LogNormal(f64(0.0), f64(1.0)).expand(list(size)).to_event(len(size)))


def half_student(df: float, scale: float) -> dist.TorchDistribution:
    """Student's t of location 0, restricted to the positive numbers."""
    return dist.FoldedDistribution(dist.StudentT(f64(df), f64(0.0), f64(scale)))


def fill_plate(values: Tensor, event_dim: int = 0) -> Tensor:
    """`(*particles, 1, n, *event)` -> `(*particles, n, *event)`; `(n, *event)` stays.

    A latent vector leaves dimension -1 to the plates, as size 1; n outputs of it along a plate belong there.
    """
    return values.squeeze(-event_dim - 2) if values.dim() > event_dim + 1 else values


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x w along the plate of rows: `(n, D)` and `(*particles, 1, D)` or `(D)` -> `(*particles, n)` or `(n)`."""
    return fill_plate(weight @ x.mT)


def require(name: str, ok: Tensor) -> None:
    """Adds -inf to the log joint where not `ok` (over the plates of one latent)."""
    pyro.factor(name, f64(0.0).where(ok, f64(-torch.inf)))
