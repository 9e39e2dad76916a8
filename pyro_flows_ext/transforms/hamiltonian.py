"""Hamiltonian dynamics of a position and its momentum: leapfrog steps, tempered or not, under a given potential."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from ._constrain import check_event, check_positive
from .base import FlowTransform
from .conditional import ContextualFlow

Potential = Callable[..., Tensor]
Tempering = Literal[False, "quadratic", "free"]

# β_0 before training: a tempered flow starts near the plain one.
INITIAL_BETA = 0.9


class LeapfrogOptions(TypedDict, total=False):
    """Keywords of leapfrog flows: see `Leapfrog`."""

    step_size: float
    tempering: Tempering


class Leapfrog(FlowTransform):
    """`num_layers` leapfrog steps on x = (z, ρ), a position and its momentum of D = `latent_dim` numbers each:

        ρ <- ρ - ½ ε_k ⊙ ∇U(z),    z <- z + ε_k ⊙ ρ / m,    ρ <- α_k (ρ - ½ ε_k ⊙ ∇U(z)),    k = 1, ..., K.

    log|det| = D Σ log α_k, exact: every line is a shear, or scales the momentum. Without tempering α_k = 1 and the
    log-det is 0.
    The steps ε `(K, D)` are learned by step and by coordinate, the masses m `(D)` by coordinate, all positive for any
    parameter value (`log_step`, `log_mass`). With all steps equal the map is symplectic; otherwise it keeps volume.

    `potential`: U, minus a log-density up to a constant, a function z `(*, D)` -> `(*)` that autograd can
    differentiate twice. Each row must depend on its own z alone: the gradient is taken of the sum over rows, which a
    potential that mixes rows (batch statistics, a mean over rows) makes wrong, without an error. A `nn.Module` is a
    part of the transform, and trains with it; gradients reach what any other callable closes over, but such a one
    is not watched, so none of its passes is remembered: scoring a draw costs a second pass.
    With `context_dim` > 0 it is `potential(z, context)`, and the transform needs `with_context`: use
    `ConditionalLeapfrog`.
    `tempering`: α_k = √(β_{k-1} / β_k) <= 1 with inverse temperatures β_0 < ... < β_K = 1. "quadratic": 1/√β_k falls
    with k² from 1/√β_0 to 1, with β_0 learned; "free": every α_k learned.

    As a variational family: draw z from any density, ρ from N(0, m / β_0) (`momentum_scale`), and take
    p(z) N(ρ; 0, m) for the target after the flow.
    Shapes: x `(*, 2D)` -> y `(*, 2D)`, ladj `(*)`; the position comes first.
    Cost: K + 1 gradients of the potential, in both directions.
    Raises `ValueError` when the last dimension is not 2D, when the potential does not give one number a row or no
    gradient, when a context is needed and none was given.

    Source: Neal 2011, MCMC using Hamiltonian dynamics; Salimans, Kingma & Welling 2015, Markov Chain Monte Carlo and
    Variational Inference: Bridging the Gap; tempering: Caterini, Doucet & Sejdinovic 2018, Hamiltonian Variational
    Auto-Encoder.
    """

    potential: Potential

    def __init__(
        self,
        potential: Potential,
        latent_dim: int,
        num_layers: int = 5,
        *,
        step_size: float = 0.1,
        tempering: Tempering = False,
        context_dim: int = 0,
    ):
        super().__init__()
        if not callable(potential):
            raise TypeError(f"potential: expected a callable, got a {type(potential).__name__}")
        if not step_size > 0:
            raise ValueError(f"step_size: expected a positive number, got {step_size!r}")
        self.latent_dim = D = check_positive("latent_dim", latent_dim)
        self.num_layers = K = check_positive("num_layers", num_layers)
        self.input_dim = 2 * D
        self.tempering = tempering
        self.context_dim = context_dim
        self.potential = potential
        self.log_step = nn.Parameter(torch.full((K, D), math.log(step_size)))
        self.log_mass = nn.Parameter(torch.zeros(D))
        if tempering == "quadratic":
            self.tempering_logit = nn.Parameter(torch.full((1,), _logit(INITIAL_BETA)))
        elif tempering == "free":
            start = _logit(INITIAL_BETA ** (0.5 / K))
            self.tempering_logit = nn.Parameter(torch.full((K,), start))
        elif tempering:
            raise ValueError(
                f"tempering: expected one of False, quadratic, free; got {tempering!r}"
            )

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gradient, z, momentum = self._start("x", x)
        kicks, drifts, log_alpha = self._schedule()
        momentum = torch.addcmul(momentum, kicks[0], gradient(z), value=-1)
        for k, drift in enumerate(drifts):
            z = torch.addcmul(z, drift, momentum)
            if log_alpha is not None:
                momentum = momentum * log_alpha[..., k, None].exp()
            momentum = torch.addcmul(momentum, kicks[k + 1], gradient(z), value=-1)
        return torch.cat([z, momentum], -1), self._ladj(z, log_alpha)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        gradient, z, momentum = self._start("y", y)
        kicks, drifts, log_alpha = self._schedule()
        for k in reversed(range(self.num_layers)):
            momentum = torch.addcmul(momentum, kicks[k + 1], gradient(z))
            if log_alpha is not None:
                momentum = momentum * (-log_alpha[..., k, None]).exp()
            z = torch.addcmul(z, drifts[k], momentum, value=-1)
        momentum = torch.addcmul(momentum, kicks[0], gradient(z))
        return torch.cat([z, momentum], -1), -self._ladj(z, log_alpha)

    @property
    def step_size(self) -> Tensor:
        """ε `(K, D)`."""
        return self.log_step.exp()

    @property
    def mass(self) -> Tensor:
        """m `(D)`, the variances of the momentum after the flow."""
        return self.log_mass.exp()

    @property
    def momentum_scale(self) -> Tensor:
        """√(m / β_0) `(D)`, the standard deviations of the momentum before the flow."""
        log_scale = self.log_mass / 2
        if (log_alpha := self._log_alpha()) is not None:
            log_scale = log_scale - log_alpha.sum(-1, keepdim=True)  # Σ log α_k = ½ log β_0
        return log_scale.exp()

    def _start(self, name: str, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
        """∇U at this context, position and momentum, over the batch that x, parameters and context broadcast to."""
        check_event(name, x, self.input_dim)
        batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        context: tuple[Tensor, ...] = ()
        if (given := self._read_context()) is not None:
            context = (given.expand(*batch, -1),)

        def energy(z: Tensor) -> Tensor:
            value = self.potential(z, *context)
            if not isinstance(value, Tensor) or value.shape != z.shape[:-1]:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"potential: expected one number a row, for z of shape {tuple(z.shape)} a tensor of shape "
                    f"{tuple(z.shape[:-1])}, got {got}"
                )
            return value.sum()

        z, momentum = x.expand(*batch, -1).chunk(2, -1)
        return lambda z: _gradient(energy, z), z, momentum

    def _schedule(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """What multiplies the K + 1 gradients and the K momenta, each `(*, D)`, and log α `(*, K)`.

        The half step that ends one step and the one that begins the next share their gradient.
        """
        step, log_alpha = self.step_size, self._log_alpha()
        drifts = step * (-self.log_mass).exp().unsqueeze(-2)
        first = last = step / 2
        if log_alpha is not None:
            last = first * log_alpha.exp().unsqueeze(-1)
        kicks = F.pad(first, (0, 0, 0, 1)) + F.pad(last, (0, 0, 1, 0))
        return kicks.unbind(-2), drifts.unbind(-2), log_alpha

    def _log_alpha(self) -> Tensor | None:
        """log α_k `(*, K)`, k = 1, ..., K."""
        if self.tempering == "free":
            return F.logsigmoid(self.tempering_logit)
        if self.tempering == "quadratic":
            # 1/√β_k = 1 + (1/√β_0 - 1)(1 - k²/K²), and 1/√β_0 = √(1 + exp(-logit)).
            k = torch.arange(self.num_layers + 1, device=self.log_step.device)
            share = 1 - (k / self.num_layers).to(self.log_step.dtype).square()
            excess = (F.softplus(-self.tempering_logit) / 2).expm1()
            return (excess * share).log1p().diff(dim=-1)
        return None

    def _ladj(self, z: Tensor, log_alpha: Tensor | None) -> Tensor:
        if log_alpha is None:
            return z.new_zeros(z.shape[:-1])
        return (self.latent_dim * log_alpha.sum(-1)).expand(z.shape[:-1])

    def _state(self) -> list[Tensor]:
        state = super()._state()
        if not isinstance(self.potential, nn.Module):
            # What a callable closes over can be neither seen nor compared: with a tensor that is new each time, no pass
            # of this transform, or of a chain that it is part of, is ever taken for the same again.
            state.append(torch.empty(0))
        return state

    def extra_repr(self) -> str:
        tempering = f", tempering={self.tempering!r}" if self.tempering else ""
        return f"latent_dim={self.latent_dim}, num_layers={self.num_layers}{tempering}"


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def _gradient(energy: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """∇ energy(z), differentiable in z and in everything that `energy` depends on; `ValueError` where there is none."""
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.is_inference_mode_enabled()
    ):
        return torch.func.grad(energy)(z)
    # In eager mode the same by plain autograd: functorch doubles the time of a pass over a small potential.
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not z.requires_grad:
            z = (z.clone() if z.is_inference() else z.detach()).requires_grad_()
        value = energy(z)
        if not value.requires_grad:
            raise ValueError(
                "potential: its value has no gradient; compute it from z by differentiable operations of torch, "
                "outside no_grad"
            )
        return torch.autograd.grad(
            value, z, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )[0]


class ConditionalLeapfrog(ContextualFlow):
    """`Leapfrog` under `potential(z, context)`: dynamics by datum; `.condition(context)` gives the transform.

    The context `(*, C)` comes expanded to the batch of z. Steps, masses and temperatures are shared by all contexts.
    """

    @staticmethod
    def base(
        latent_dim: int,
        _: None,
        *,
        potential: Potential,
        num_layers: int,
        context_dim: int,
        **options,
    ) -> Leapfrog:
        return Leapfrog(potential, latent_dim, num_layers, context_dim=context_dim, **options)

    def __init__(
        self,
        potential: Potential,
        latent_dim: int,
        context_dim: int,
        num_layers: int = 5,
        **options: Unpack[LeapfrogOptions],
    ):
        super().__init__(
            latent_dim, context_dim, potential=potential, num_layers=num_layers, **options
        )


def leapfrog(
    potential: Potential, latent_dim: int, num_layers: int = 5, **options: Unpack[LeapfrogOptions]
) -> Leapfrog:
    """Leapfrog steps on position and momentum: see `Leapfrog`."""
    return Leapfrog(potential, latent_dim, num_layers, **options)


def conditional_leapfrog(
    potential: Potential,
    latent_dim: int,
    context_dim: int,
    num_layers: int = 5,
    **options: Unpack[LeapfrogOptions],
) -> ConditionalLeapfrog:
    """Leapfrog steps under a potential that sees a context: see `ConditionalLeapfrog`."""
    return ConditionalLeapfrog(potential, latent_dim, context_dim, num_layers, **options)
