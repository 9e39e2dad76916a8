"""Variational distributions fitted to every datum by itself, all data at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..transforms import ComposeFlow, FlowTransform, LULinear, Planar
from .local_density import LocalDensity

# Steps between two evaluations of the bound; the factor of the learning rate if it has not risen; how often that happens.
BLOCK, DECAY, NUM_DECAYS = 100, 0.3, 3
# A rise of the mean bound by less than this in a block, nats, is none.
LEAST_RISE = 1e-3
# Adam's first learning rates: of a Gaussian's location and log scale in units of its start, and of a flow.
GAUSSIAN_RATE, FLOW_RATE = 0.05, 0.02


class Fit(NamedTuple):
    """How a fit went: its steps, and whether it stopped by itself."""

    steps: int
    converged: bool


class Local(Protocol):
    """A distribution q_n for every datum n."""

    parameters: list[Tensor]
    learning_rate: float

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        """u `(num, N, D)` and log q_n(u) `(num, N)`, differentiable in the parameters."""


class LocalGaussian:
    """N(m_n, diag s_n²) for every datum n, in units of a start: `loc`, `scale` `(N, D)`."""

    learning_rate = GAUSSIAN_RATE

    def __init__(self, loc: Tensor, scale: Tensor):
        self._start = loc.detach(), scale.detach()
        shift = torch.zeros_like(loc).requires_grad_()
        log_scale = torch.zeros_like(loc).requires_grad_()
        self.parameters = [shift, log_scale]

    @property
    def loc(self) -> Tensor:
        loc, scale = self._start
        return loc + scale * self.parameters[0]

    @property
    def scale(self) -> Tensor:
        return self._start[1] * self.parameters[1].exp()

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        loc, scale = self.loc, self.scale
        u = loc + scale * torch.randn(num, *loc.shape, dtype=loc.dtype, device=loc.device)
        # The parameters inside log q are held fixed (Roeder, Wu & Duvenaud 2017, Sticking the Landing): no noise is
        # left in the gradient where the posterior is such a Gaussian.
        return u, _normal(u, loc.detach(), scale.detach())


class LocalFlow:
    """m_n + s_n ⊙ f(ε; θ_n), ε ~ N(0, I), with its own θ_n for every datum n, started at a Gaussian."""

    learning_rate = FLOW_RATE

    def __init__(self, flow: FlowTransform, start: LocalGaussian):
        loc, log_scale = start.loc.detach().clone(), start.scale.detach().log()
        self.pass_ = _Pass(flow.eval().to(dtype=loc.dtype, device=loc.device))
        self.names = [name for name, _ in self.pass_.named_parameters()]
        N = len(loc)
        thetas = [p.detach().expand(N, *p.shape).clone() for p in self.pass_.parameters()]
        self._unit = log_scale.exp()
        self.parameters = [t.requires_grad_() for t in (torch.zeros_like(loc), log_scale, *thetas)]
        self._loc = loc

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        shift, log_scale, *thetas = self.parameters
        N, D = shift.shape
        noise = torch.randn(N, num, D, dtype=shift.dtype, device=shift.device)
        v, ladj = vmap(self._one)(thetas, noise)
        u = self._loc + self._unit * shift + log_scale.exp() * v.movedim(0, 1)
        zero, one = torch.zeros_like(shift), torch.ones_like(shift)
        log_q = _normal(noise.movedim(0, 1), zero, one) - ladj.mT - log_scale.sum(-1)
        return u, log_q

    def _one(self, theta: list[Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(self.names, theta, strict=True))
        return functional_call(self.pass_, parameters, (noise,))


class _Pass(nn.Module):
    """A transform's forward pass as the module's own: what `functional_call` calls."""

    def __init__(self, flow: FlowTransform):
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.forward_and_ladj(x)


def full_rank_planar(dim: int) -> FlowTransform:
    """Planar layers and a linear map behind them: every Gaussian, and bends of it. O(D²) parameters, any D."""
    return ComposeFlow([Planar(dim, num_layers=8), LULinear(dim)])


def maximise(density: LocalDensity, q: Local, num_particles: int, max_steps: int) -> Fit:
    """Raises the bounds Σ_n E log p(x_n, u) - log q_n(u) by Adam, in place, until their mean has stopped to rise.

    When a block of steps is no better than the best one before it, by more than its own standard error, the learning
    rate falls; after the third time the fit ends. The last of `max_steps` have falling rates in any case. Particles
    without density are left out of a step.
    """
    optimizer = torch.optim.Adam(q.parameters, lr=q.learning_rate)
    best, decays, steps = -math.inf, 0, 0
    while steps < max_steps:
        num = min(BLOCK, max_steps - steps)
        block = torch.stack([_step(density, q, num_particles, optimizer) for _ in range(num)])
        steps += num
        mean = block.mean().item()
        error = block.std().item() / num**0.5 if num > 1 else math.inf
        has_risen = mean > best + max(error, LEAST_RISE)
        best = max(best, mean)
        if decays == NUM_DECAYS and not has_risen:
            return Fit(steps, True)
        is_late = max_steps - steps <= BLOCK * (NUM_DECAYS - decays)
        if decays < NUM_DECAYS and (is_late or not has_risen):
            decays += 1
            for group in optimizer.param_groups:
                group["lr"] *= DECAY
    return Fit(steps, False)


def _step(
    density: LocalDensity, q: Local, num_particles: int, optimizer: torch.optim.Optimizer
) -> Tensor:
    """One step; the mean bound of a datum before it."""
    u, log_q = q.draw(num_particles)
    log_p, gradient = density.value_and_gradient(u)
    usable = log_p.isfinite() & log_q.isfinite()
    # The gradient of the model is taken at u alone, so that no graph reaches its parameters.
    surrogate = (gradient * u).sum(-1) - log_q
    loss = -torch.where(usable, surrogate, 0.0).sum() / num_particles
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    bound = torch.where(usable, log_p - log_q.detach(), 0.0).sum() / usable.sum().clamp(min=1)
    return bound.double()


@torch.no_grad()
def log_weights(
    density: LocalDensity,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    num_samples: int,
    chunk_size: int,
) -> Tensor:
    """log p(x_n, u) - log q_n(u) of `num_samples` draws, `chunk_size` at a time: `(num_samples, N)`, float64."""
    chunks = []
    for start in range(0, num_samples, chunk_size):
        u, log_q = draw(min(chunk_size, num_samples - start))
        chunks.append(density(u).double() - log_q.double())
    return torch.cat(chunks)


def _normal(u: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    standard = (u - loc) / scale
    constant = 0.5 * math.log(2 * math.pi)
    return -(standard.square() / 2 + scale.log() + constant).sum(-1)
