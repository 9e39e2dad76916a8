"""Hamiltonian dynamics of a position and its momentum: leapfrog steps, tempered or not, under a given potential."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import broadcast_shapes, check_context_dim, check_positive
from .base import FlowTransform

Potential = Callable[..., Tensor]
Tempering = Literal[False, "quadratic", "free"]

# β_0 before training: a tempered flow starts near the plain one.
INITIAL_BETA = 0.9


class Leapfrog(FlowTransform):
    """K = `num_layers` leapfrog steps on x = (z, ρ), a position and its momentum of D numbers each:

        ρ <- ρ - ½ ε_k ⊙ ∇U(z),    z <- z + ε_k ⊙ ρ / m,    ρ <- α_k (ρ - ½ ε_k ⊙ ∇U(z)),    k = 1, ..., K.

    log|det| = D Σ log α_k, exact: every line is a shear, or scales the momentum. The steps ε `(K, D)` and the masses
    m `(D)` are learned, and positive for any parameter value (`log_step`, `log_mass`). As a variational family: draw
    ρ from N(0, m / β_0) (`momentum_scale`), and take p(z) N(ρ; 0, m) for the target after the flow. Events are
    `(*, 2D)`, the position first. Cost: K + 1 gradients of the potential, in both directions.

    Args:
        potential: U, minus a log-density up to a constant: z `(*, D)` -> `(*)`, and `potential(z, context)` with a
            context `(*, C)`. Each row must depend on its own z alone. A module trains with the transform; any other
            callable cannot be compared, so no pass is reused.
        latent_dim: D.
        num_layers: K, the number of leapfrog steps.
        step_size: initial value of all ε.
        tempering: α_k = √(β_{k-1} / β_k) <= 1 with β_0 < ... < β_K = 1: False for α_k = 1, "quadratic" for 1/√β_k
            that falls with k² from a learned 1/√β_0, "free" for learned α_k.
        context_dim: number of context variables of the potential.

    Raises:
        ValueError: in a pass, if the last dimension is not 2D, or `potential` returns other than one number a row
            or has no gradient.

    Example:
        >>> flow = Leapfrog(lambda z: (z**2).sum(-1) / 2, latent_dim=2, num_layers=3)
        >>> flow(torch.zeros(5, 4)).shape
        torch.Size([5, 4])

    References:
        Neal 2011, MCMC using Hamiltonian dynamics; Salimans, Kingma & Welling 2015, Markov Chain Monte Carlo and
        Variational Inference; tempering: Caterini, Doucet & Sejdinovic 2018, Hamiltonian Variational Auto-Encoder.
    """

    potential: Potential
    tempering_logit: nn.Parameter

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
        self.context_dim = check_context_dim(context_dim)
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
        self._check_input(name, x)
        batch = broadcast_shapes(x.shape[:-1], self.batch_shape)
        context = () if self.context is None else (self.context.expand(*batch, -1),)

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
        """The factors of the K + 1 gradients and of the K momenta, each `(*, D)`, and log α `(*, K)`.

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

    def _watched(self) -> list[Tensor]:
        # Tensors that a callable closes over can be neither found nor compared: with a tensor that is new each time, no
        # pass of this transform, or of a chain that it is part of, is reused.
        return [] if isinstance(self.potential, nn.Module) else [torch.empty(0)]

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
