"""Residual flows: y = x + g(x) with a contraction g (Behrmann et al. 2019, Chen et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from ..nn import LipschitzConvNet, LipschitzMLP, LipSwish
from ..ops import (
    Linearizable,
    Opaque,
    Product,
    contraction_inverse,
    exact_log_det,
    log_det_series,
    neumann_log_det,
    roulette_weights,
)
from ._constrain import IMAGE, check_event, check_positive, read_event_shape
from .base import FlowTransform
from .conditional import ContextualFlow

# Up to this dimension the log-det is exact in eval mode unless somebody says otherwise.
EXACT_DIM = 16


@dataclass(frozen=True, eq=False)
class LogDetNoise:
    """All that is random in an estimate of a log-det: see `ResidualFlow.draw_noise`.

    v: probes `(S, *, event)` with E vvᵀ = I, broadcast against the input and averaged over S. weights: one factor for
    each term of the power series, the inverse of the probability that the term was taken.
    """

    v: Tensor
    weights: tuple[float, ...]

    @property
    def num_terms(self) -> int:
        return len(self.weights)


class ResidualOptions(TypedDict, total=False):
    """Keywords of residual flows: see `ResidualFlow`."""

    lipschitz: float
    exact_log_det: bool | None
    num_exact_terms: int | None
    continue_prob: float
    num_probes: int
    neumann_gradient: bool
    net: nn.Module | None
    activation: Callable[[], nn.Module]


class ResidualFlow(FlowTransform):
    """y = x + g(x) with Lip(g) <= `lipschitz` < 1; log|det| = log det(I + J), J = ∂g/∂x: exact, or an unbiased estimate.

    Every variable may depend on every other, and J is free but for its norm. g is an `nn.LipschitzMLP` of `hidden_dims`
    for vectors (`input_dim` = D) and an `nn.LipschitzConvNet` of those widths for images (`input_dim` = `(C, H, W)`), a
    contraction for any parameter values; it starts at zero, and the transform at the identity. `net`: any module
    `net(x)` of your own in its place, `net(x, context)` with a context, of events to events; that its
    Lipschitz constant is `lipschitz` at most (its attribute of that name, if it has one) is then your word.
    `context_dim` > 0 makes a layer that needs `with_context`: use the conditional classes.

    Log-det. Exact by an LU decomposition of the D x D Jacobian, which costs D products with it, when `exact_log_det` is
    True, or when it is None, in eval mode, for D <= 16. (True is worth its price in training, too, for a few variables:
    for two it costs what an estimate does.) Otherwise the power series Σ_k (-1)^(k+1) tr(Jᵏ) / k, with `num_exact_terms`
    leading terms (None: 2 in training mode, 20 in eval mode) and Russian roulette for the rest: each further term is
    taken with the probability `continue_prob`, given the one before it, and weighted up accordingly; its traces are
    vᵀJᵏv for `num_probes` Rademacher vectors v a row. That is unbiased for any parameters. Its variance is finite where the
    spectral radius of J is below √continue_prob: .84 by default (trained layers came to .5 to .78). More than
    lipschitz² (.95) is enough for every one, with 19 further terms in the mean. Most of the variance comes from the
    probes, and does not fall with the number of terms.

    Randomness. A pass that estimates draws fresh noise from torch's global generator, so that two passes over one value
    differ, while `t(x)` and `t.log_abs_det_jacobian(x, y)` after it agree, by the cache. `t.with_noise(noise)`
    is a view with the noise held fixed, which scores the same value the same, in both directions and modes;
    `t.draw_noise(x, generator)` draws one. Under `torch.compile`, give the noise.

    Gradients. With `neumann_gradient` (the default) those of an estimate are an estimate too, from the Neumann series:
    unbiased, right for each row under any weights, at the memory of one product; they have no second derivative, and for
    one noise are not the derivative of the value. False differentiates the power series, and keeps every term's graph.

    Inverse: the fixed point x = y - g(x), accelerated: see `ops.contraction_inverse`, also for derivatives.

    Shapes: x `(*, D)` or `(*, C, H, W)` -> y the same, ladj `(*)`. Cost: one pass of g forward, 4 to 10 with Jacobians
    backward (10 to 30 without, for D > 16). Raises `ValueError` where an input has another shape, where a context is
    needed and none was given, and for options out of range.

    Source: Behrmann, Grathwohl, Chen, Duvenaud & Jacobsen 2019, Invertible Residual Networks; Chen, Behrmann, Duvenaud &
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
        self.context_dim = context_dim
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

    @property
    def domain(self) -> Any:  # type: ignore[override]
        return IMAGE if len(self.event_shape) == 3 else constraints.real_vector

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return self.domain

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
        check_event(name, x, self.event_shape)
        if (context := self._read_context()) is not None:
            x = x.expand(self.forward_shape(x.shape))
        if hasattr(self.net, "bind"):
            return self.net.bind(context), x  # type: ignore[operator]
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
        """The noise of an estimate at `x` `(*, event)`: probes for each row, one number of terms for all.

        Without a `generator` the probes are drawn where x is, and the number of terms on the CPU.
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
        """This transform with log-dets estimated by `noise` in every pass, in either mode; parameters are shared."""
        if self.exact_log_det:
            raise ValueError("noise: expected none, since exact_log_det=True")
        view = self._view(self.batch_shape, *self.__dict__.get("_bound", ()), noise.v)
        view.__dict__["noise"] = noise
        return view

    def extra_repr(self) -> str:
        exact = "" if self.exact_log_det is None else f", exact_log_det={self.exact_log_det}"
        return f"{self.input_dim}, lipschitz={self.lipschitz:g}{exact}"


class ConditionalResidualFlow(ContextualFlow):
    """`ResidualFlow` whose g also sees a context `(*, C)`, and is a contraction in x for each; `.condition(context)`."""

    base = ResidualFlow


def residual_flow(
    input_dim: int | Sequence[int],
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[ResidualOptions],
) -> ResidualFlow:
    """A residual flow of vectors (D) or images (C, H, W): see `ResidualFlow`."""
    return ResidualFlow(input_dim, hidden_dims, **options)


def conditional_residual_flow(
    input_dim: int | Sequence[int],
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[ResidualOptions],
) -> ConditionalResidualFlow:
    """A residual flow amortized over a context: see `ConditionalResidualFlow`."""
    return ConditionalResidualFlow(input_dim, context_dim, hidden_dims, **options)
