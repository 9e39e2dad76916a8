"""`Dequantized`: whole numbers, scored by a density of real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from typing_extensions import Self

from ..nn import MLP
from ..ops import broadcast_shapes, check_positive
from ..transforms import LogitPreprocess
from ._bound import BoundedDensity
from .base import Density
from .normal import affine_by, log_standard_normal

KINDS = ("uniform", "variational")


class Dequantized(BoundedDensity):
    """Whole numbers x in 0 ... L - 1 by a density p of logit((x + u) / L), u in [0, 1)^D, L = `num_levels`:

        log P(x) >= E_q(u|x) [log p(s) + log|ds/dy| - D log L - log q(u|x)],  y = (x + u) / L,  s = logit(α + (1 - 2α)
        y).

    `log_prob` is one draw of the bound, in nats; `log_prob_bound` is its importance-weighted form; `bits_per_dim` is
    the customary unit. `sample` returns whole numbers. Cost: a pass of the flow.

    Args:
        flow: the density p, of vectors or images of real numbers. One with a context gives P(x | context); q has none.
        kind: q(u | x): "uniform"; or "variational", u = sigmoid of a normal by pixel with location and scale from
            `net`.
        num_levels: L.
        logit_alpha: α, .05 for natural images, 1e-6 for MNIST; None without the logit, for a density of [0, 1]^D
            itself.
        net: a module `(*, D)` -> `(*, 2 D)` of x scaled to [-1, 1] and flattened, trained with the flow.
        hidden_dims: widths of the default `net`, a multilayer perceptron.

    Raises:
        TypeError: for a flow that is no `Density`.
        ValueError: for arguments out of range; with `validate_args`, for values that are no whole numbers of the range.

    References:
        Theis, van den Oord & Bethge 2016, A note on the evaluation of generative models; logits: Dinh et al. 2017;
        variational: Ho, Chen, Srinivas, Duan & Abbeel 2019, Flow++.
    """

    has_rsample = False

    def __init__(
        self,
        flow: Density,
        kind: str = "uniform",
        *,
        num_levels: int = 256,
        logit_alpha: float | None = 0.05,
        net: nn.Module | None = None,
        hidden_dims: Sequence[int] = (64,),
        validate_args: bool | None = None,
    ):
        if not isinstance(flow, Density):
            raise TypeError(
                f"flow: expected a density that is a module, such as FlowDistribution, got a {type(flow).__name__}"
            )
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
        if kind == "uniform" and net is not None:
            raise ValueError('net: expected none for kind="uniform"')
        super().__init__(flow.batch_shape, flow.event_shape, validate_args)
        self.flow, self.kind, self.hidden_dims = flow, kind, tuple(hidden_dims)
        self.context: Tensor | None = None
        self.num_levels = check_positive("num_levels", num_levels)
        dims = len(flow.event_shape)
        self.preprocess = None if logit_alpha is None else LogitPreprocess(logit_alpha, dims)
        size = flow.event_shape.numel()
        if kind == "variational" and net is None:
            net = MLP(size, 2 * size, hidden_dims, zero_last=True)
        self.net = net

    @property
    def context_dim(self) -> int:  # type: ignore[override]
        """The length of the context that `condition` takes; 0 for none, and once conditioned."""
        return self.flow.context_dim

    def condition(self, context: Tensor) -> Self:
        """The density at this context, `(*, C)`: its batch shape is `(*)`, broadcast against the flow's."""
        flow = self.flow.condition(context)
        batch = broadcast_shapes(self.batch_shape, flow.batch_shape)
        return self._view(batch, flow=flow, context=context)

    @property
    def support(self) -> Any:
        return constraints.independent(
            constraints.integer_interval(0, self.num_levels - 1), len(self.event_shape)
        )

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Whole numbers `(*sample_shape, *batch_shape, *event_shape)`, as floats; draws beyond the range are clamped."""
        y = self.flow.expand(self.batch_shape).sample(torch.Size(sample_shape))
        if self.preprocess is not None:
            y = self.preprocess.inverse_and_ladj(y)[0]
        return (y * self.num_levels).floor().clamp(0, self.num_levels - 1)

    def bits_per_dim(
        self, value: Tensor, noise: Tensor | None = None, num_particles: int = 1
    ) -> Tensor:
        """Upper bound: minus the bound on log P in bits, by element of the event.

        Args:
            value: `(*, *event_shape)`.
            noise: of the shape of `value`: u in [0, 1) for kind="uniform", the standard normal behind u for
                "variational"; drawn by default.
            num_particles: K of `log_prob_bound`, without `noise`.

        Returns:
            `(*)`.
        """
        if noise is not None:
            bound = self._log_weights(self._expanded(value), noise)
        else:
            bound = self.log_prob_bound(value, num_particles)
        return -bound / (self.event_shape.numel() * math.log(2))

    def objective(self, value: Tensor) -> Tensor:
        """`log_prob` with the flow's own objective in place of its `log_prob`: penalties apply to the noisy value."""
        return self._log_weights(self._expanded(value), score=self.flow.objective)

    def _log_weights(
        self,
        value: Tensor,
        noise: Tensor | None = None,
        score: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        # At a context the flow may have no parameter left: all of them come from the context.
        like = getattr(self.flow, "context", None)
        value = value.to(
            next(self.flow.parameters(), torch.empty(0) if like is None else like).dtype
        )
        u, log_q = self._dequantize(value, noise)
        y, dims = (value + u) / self.num_levels, len(self.event_shape)
        ladj = y.new_zeros(y.shape[: y.dim() - dims])
        if self.preprocess is not None:
            y, ladj = self.preprocess.forward_and_ladj(y)
        size = self.event_shape.numel()
        log_p = self.flow.log_prob(y) if score is None else score(y)
        return log_p + ladj - size * math.log(self.num_levels) - log_q

    def _dequantize(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """u and log q(u | x)."""
        dims = len(self.event_shape)
        if self.net is None:
            u = torch.rand_like(x) if noise is None else noise
            return u, x.new_zeros(x.shape[: x.dim() - dims])
        noise = torch.randn_like(x) if noise is None else noise
        centred = 2 * (x + 0.5) / self.num_levels - 1
        logit, log_scale = affine_by(
            noise.flatten(-dims), self.net(centred.flatten(-dims)), inverse=False
        )
        log_slope = nn.functional.logsigmoid(logit) + nn.functional.logsigmoid(-logit)
        log_q = log_standard_normal(noise.flatten(-dims)) - (log_scale + log_slope).sum(-1)
        # A sigmoid may round to 1, which belongs to the next whole number.
        u = logit.sigmoid().clamp(max=1 - torch.finfo(x.dtype).eps)
        return u.reshape(x.shape), log_q
