"""Residual flows: y = x + g(x) with a contraction g (Behrmann et al. 2019, Chen et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from typing_extensions import Self

from ..nn import LipschitzConvNet, LipschitzMLP, LipSwish
from ..ops import (
    Linearizable,
    Opaque,
    Product,
    check_context_dim,
    check_event,
    check_positive,
    contraction_inverse,
    exact_log_det,
    log_det_series,
    neumann_log_det,
    read_event_shape,
    roulette_weights,
)
from .base import IMAGE, FlowTransform

# Up to this dimension the log-det is exact in eval mode by default.
EXACT_DIM = 16


@dataclass(frozen=True, eq=False)
class LogDetNoise:
    """The random numbers of an estimate of a log-det: see `ResidualFlow.draw_noise`.

    Attributes:
        v: probes `(S, *, event)` with E vvᵀ = I, broadcast against the input and averaged over S.
        weights: one factor for each term of the power series, the inverse of the probability that the term is taken.
    """

    v: Tensor
    weights: tuple[float, ...]

    @property
    def num_terms(self) -> int:
        return len(self.weights)


class ResidualFlow(FlowTransform):
    """y = x + g(x; c) with Lip(g) <= `lipschitz` < 1; log|det| = log det(I + J), J = ∂g/∂x: exact, or an unbiased estimate.

    g is a contraction for any parameter values, and starts at zero. The inverse is the fixed point x = y - g(x),
    accelerated: see `ops.contraction_inverse`. Exact log-dets cost D products with J. Estimates take the power series
    Σ_k (-1)^(k+1) tr(Jᵏ) / k, with Russian roulette beyond its leading terms and traces vᵀJᵏv; their variance is finite
    where the spectral radius of J is below √continue_prob. A pass that estimates draws fresh noise from torch's global
    generator; `with_noise` holds it fixed, as `torch.compile` needs. See the page on transforms for the cost.

    Args:
        input_dim: D for events `(*, D)`, `(C, H, W)` for images.
        hidden_dims: widths of g, an `nn.LipschitzMLP` or, for images, an `nn.LipschitzConvNet`.
        lipschitz: bound on the Lipschitz constant of g.
        exact_log_det: whether log-dets are exact; by default in eval mode for D <= 16.
        num_exact_terms: leading terms of an estimate; by default 2 in training mode, 20 in eval mode.
        continue_prob: probability of each further term, given the one before it.
        num_probes: Rademacher vectors v for each row.
        neumann_gradient: estimate gradients by the Neumann series: unbiased, at the memory of one product, without
            a second derivative. False differentiates the power series.
        net: a module `net(x)`, or `net(x, context)`, in place of the default; its Lipschitz constant must be at most
            `lipschitz`, or its own attribute of that name.
        activation: of the default network, of slope 1 at most.
        context_dim: number of context variables that g reads.

    Raises:
        ValueError: if an option is out of range, or in a pass if the input has another shape.

    Example:
        >>> flow = ResidualFlow(2, (16, 16)).eval()
        >>> x = flow.inv(torch.ones(5, 2))

    References:
        Behrmann, Grathwohl, Chen, Duvenaud & Jacobsen 2019, Invertible Residual Networks; Chen, Behrmann, Duvenaud &
        Jacobsen 2019, Residual Flows for Invertible Generative Modeling.
    """

    noise: LogDetNoise | None = None

    def __init__(
        self,
        input_dim: int | Sequence[int],
        hidden_dims: Sequence[int] | None = None,
        *,
        lipschitz: float = 0.97,
        exact_log_det: bool | None = None,
        num_exact_terms: int | None = None,
        continue_prob: float = 0.7,
        num_probes: int = 1,
        neumann_gradient: bool = True,
        net: nn.Module | None = None,
        activation: Callable[[], nn.Module] = LipSwish,
        context_dim: int = 0,
    ):
        super().__init__()
        self.event_shape = shape = read_event_shape(input_dim)
        self.input_dim = shape[0] if len(shape) == 1 else tuple(shape)
        if num_exact_terms is not None:
            check_positive("num_exact_terms", num_exact_terms)
        if not 0 < continue_prob < 1:
            raise ValueError(
                f"continue_prob: expected a number between 0 and 1, exclusive, got {continue_prob!r}"
            )
        self.exact_log_det, self.num_exact_terms = exact_log_det, num_exact_terms
        self.continue_prob, self.neumann_gradient = float(continue_prob), neumann_gradient
        self.num_probes = check_positive("num_probes", num_probes)
        self.context_dim = check_context_dim(context_dim)
        if net is None:
            options: dict[str, Any] = {
                "lipschitz": lipschitz,
                "activation": activation,
                "context_dim": context_dim,
            }
            if len(shape) == 1:
                net = LipschitzMLP(shape[0], hidden_dims, **options)
            else:
                net = LipschitzConvNet(shape[0], hidden_dims, shape[1:], **options)
        elif hidden_dims is not None:
            raise ValueError(
                "hidden_dims: these belong to the default network; give them or net, not both"
            )
        self.net = net
        self.lipschitz = float(getattr(net, "lipschitz", lipschitz))
        if not 0 < self.lipschitz < 1:
            raise ValueError(
                f"lipschitz: expected a number between 0 and 1, exclusive, got {self.lipschitz!r}"
            )

    @constraints.dependent_property
    def domain(self) -> Constraint:
        return IMAGE if len(self.event_shape) == 3 else constraints.real_vector

    @constraints.dependent_property
    def codomain(self) -> Constraint:
        return IMAGE if len(self.event_shape) == 3 else constraints.real_vector

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g, x = self._bind("x", x)
        value, product = g.linearize(x)
        return x + value, self._ladj(product, x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        g, y = self._bind("y", y)
        x = contraction_inverse(g, y, self.lipschitz, len(self.event_shape))
        return x, -self._ladj(g.linearize(x)[1], x)

    def _bind(self, name: str, x: Tensor) -> tuple[Linearizable, Tensor]:
        """g as a function of x alone, and x with the batch dimensions of the context."""
        self._check_input(name, x)
        context = self.context
        if context is not None:
            x = x.expand(self.forward_shape(x.shape))
        bind = getattr(self.net, "bind", None)
        if bind is not None:
            return bind(context), x
        return Opaque(self.net if context is None else lambda x: self.net(x, context)), x

    # --- the log-det ---

    def _ladj(self, product: Product, x: Tensor) -> Tensor:
        event_dim = len(self.event_shape)
        noise = self.noise
        if noise is None and self._is_exact():
            return exact_log_det(product, x, event_dim)
        noise = self.draw_noise(x) if noise is None else noise
        probes, *batch = noise.v.shape[: noise.v.dim() - event_dim]
        missing = x.dim() - event_dim - len(batch)
        v = noise.v.to(x).reshape(probes, *[1] * missing, *batch, *self.event_shape)
        estimate = neumann_log_det if self.neumann_gradient else log_det_series
        return estimate(product, v, noise.weights, event_dim)

    def _is_exact(self) -> bool:
        if self.exact_log_det is None:
            return not self.training and self.event_shape.numel() <= EXACT_DIM
        return self.exact_log_det

    def draw_noise(self, x: Tensor, generator: torch.Generator | None = None) -> LogDetNoise:
        """Returns the noise of an estimate at `x` `(*, event)`: probes for each row, one number of terms for all.

        Without a `generator`, the probes are drawn on the device of x, and the number of terms on the CPU.
        """
        check_event("x", x, self.event_shape)
        shape = (self.num_probes, *self.forward_shape(x.shape))
        device = x.device if generator is None else generator.device
        bits = torch.randint(2, shape, generator=generator, device=device)
        # P(N >= k) = continue_probᵏ; in float64, so that the tail is not cut where it matters.
        where = "cpu" if generator is None else generator.device
        u = torch.rand((), generator=generator, dtype=torch.float64, device=where).item()
        num_further = math.floor(math.log1p(-u) / math.log(self.continue_prob))
        num_exact = self.num_exact_terms or (2 if self.training else 20)
        weights = roulette_weights(num_exact + num_further, num_exact, self.continue_prob)
        return LogDetNoise((2 * bits - 1).to(x), weights)

    def with_noise(self, noise: LogDetNoise) -> Self:
        """Returns a view of this transform whose log-dets are estimated with `noise` in every pass, in either mode."""
        if self.exact_log_det:
            raise ValueError("noise: expected none, since exact_log_det=True")
        view = self._view(self.batch_shape, *self.__dict__.get("_bound", ()), noise.v)
        view.__dict__["noise"] = noise
        return view

    def extra_repr(self) -> str:
        exact = "" if self.exact_log_det is None else f", exact_log_det={self.exact_log_det}"
        return f"{self.input_dim}, lipschitz={self.lipschitz:g}{exact}"
