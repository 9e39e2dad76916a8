"""The autoregressive layers that tests go through."""

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    affine_autoregressive,
    conditional_affine_autoregressive,
    conditional_spline_autoregressive,
    spline_autoregressive,
)

MAKE = {"affine": affine_autoregressive, "spline": spline_autoregressive}
CONDITIONAL = {
    "affine": conditional_affine_autoregressive,
    "spline": conditional_spline_autoregressive,
}
KINDS = pytest.mark.parametrize("kind", MAKE)
ORDER = [2, 0, 3, 1]


# What the catalogue has not: other orders, no hidden layer, many layers, a chain of both orientations.
def normal(dim):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def made(kind, dim=4, *, scale=0.7, **options):
    return perturb(MAKE[kind](dim, (16,), **options).double(), scale=scale)


def train(transform, loss, steps, lr):
    """Adam, with a learning rate that falls to nothing."""
    optimizer = torch.optim.Adam(transform.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
