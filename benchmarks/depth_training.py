"""What the parts of the depth study share: sets in the plane, maximum likelihood, and a distance of samples."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_flows_ext.transforms import FlowTransform

# Blue, vermilion, green and black stay apart for the colour-blind (Okabe & Ito 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#333333")


def moons(num: int) -> Tensor:
    """Two interleaved half circles with normal noise of sd .05, by scikit-learn, centred and scaled by 1.5."""
    from sklearn.datasets import make_moons

    seed = int(torch.randint(2**31, ()))
    data = torch.as_tensor(make_moons(num, noise=0.05, random_state=seed)[0], dtype=torch.float32)
    return 1.5 * (data - torch.tensor([0.5, 0.25]))


def eight_gaussians(num: int, radius: float = 2.0, sd: float = 0.1) -> Tensor:
    """Eight normals of sd .1 on a circle of radius 2."""
    angle = torch.randint(8, (num,)) * (torch.pi / 4)
    return radius * torch.stack([angle.cos(), angle.sin()], -1) + sd * torch.randn(num, 2)


def two_squares(num: int) -> Tensor:
    """Two uniform unit squares two apart: [-2, -1] x [-½, ½] and [1, 2] x [-½, ½]. Entropy log 2 = .693 nats."""
    side = 2.0 * torch.randint(2, (num,)) - 1
    return torch.rand(num, 2) - 0.5 + torch.stack([1.5 * side, torch.zeros(num)], -1)


def base(dim: int) -> dist.TorchDistribution:
    """N(0, I)."""
    return dist.Normal(torch.zeros(dim), 1.0, validate_args=False).to_event(1)


def log_prob(flow: FlowTransform, y: Tensor) -> Tensor:
    """log density of f(z), z ~ N(0, I), at y `(N, D)`, in nats: `(N)`."""
    z, ladj = flow.inverse_and_ladj(y)
    return base(y.shape[-1]).log_prob(z) + ladj


def maximum_likelihood(
    flow: FlowTransform,
    draw_batch: Callable[[int], Tensor],
    steps: int,
    *,
    lr: float = 5e-3,
    batch: int = 256,
    look: Callable[[int], None] = lambda step: None,
) -> FlowTransform:
    """Trains `flow`: Adam, cosine to zero, gradients clipped at norm 10, no step where they are not finite.

    Calls `look` before each step, and last.
    """
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        look(step)
        loss = -log_prob(flow, draw_batch(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        if torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0).isfinite():
            optimizer.step()
        schedule.step()
    look(steps)
    return flow


def in_float64(flow: FlowTransform) -> FlowTransform:
    """A copy in double precision, in which a condition number of 10⁸ is no rounding."""
    return copy.deepcopy(flow).double()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| from samples `(N, D)`, `(M, D)`: zero only for equal laws; unbiased.

    Székely & Rizzo 2013, Energy statistics: a class of statistics based on distances.
    """
    within = sum(torch.cdist(v, v).sum() / (len(v) * (len(v) - 1)) for v in (x, y))
    return float(2 * torch.cdist(x, y).mean() - within)
