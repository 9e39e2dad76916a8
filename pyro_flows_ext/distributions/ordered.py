"""`NestedDropoutFlow`: an exact density whose latents are ordered, so that the first few reconstruct the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..transforms import FlowTransform
from .flow import FlowDistribution


class NestedDropoutFlow(FlowDistribution):
    """An exact density x = f(z) with ordered latents, trained to minimise -log p(x) + λ E_k ‖x - f(P_k f⁻¹(x))‖².

    P_k keeps the first k latents in their order and sets the others to 0. k is geometric from 1, by datum, and at most
    D. z_1 then explains most of x, as a first principal component does. `log_prob` stays the exact log-density of the
    flow. In a model, call `flow.observe("x", x)` inside its plate: `pyro.sample("x", flow, obs=x)`, and the penalty as
    a factor. Cost: `log_prob` an inverse pass; `penalty`, `objective` and `observe` an inverse and a forward pass, with
    gradients.

    Args:
        base, transforms: as in `FlowDistribution`, without a context; the base is centred at 0.
        index_prob: probability of the geometric distribution of k.
        reconstruction_weight: λ, in nats by squared unit of x.
        order: the latents, flat, from the first to be kept to the last (all D, each once); None for their own order.

    Raises:
        ValueError: for arguments out of range, and for a transform that takes a context.

    Warns if a transform takes sweeps or finds roots in one direction, since the penalty takes both.

    References:
        Bekasov & Murray 2020, Ordering Dimensions with Nested Dropout Normalizing Flows, eq. 6.
    """

    order: Tensor

    def __init__(
        self,
        base: Distribution | nn.Module,
        transforms: FlowTransform | Sequence[FlowTransform],
        *,
        index_prob: float = 0.33,
        reconstruction_weight: float = 20.0,
        order: Tensor | Sequence[int] | None = None,
        validate_args: bool | None = None,
    ):
        if not 0 < index_prob < 1:
            raise ValueError(f"index_prob: expected a number between 0 and 1, got {index_prob!r}")
        if not 0 <= reconstruction_weight < math.inf:
            raise ValueError(
                f"reconstruction_weight: expected a finite number >= 0, got {reconstruction_weight!r}"
            )
        super().__init__(base, transforms, validate_args=validate_args)
        if self.transform.context_dim:
            raise ValueError(
                "transforms: expected transforms without a context, whose latents have one order; got a context_dim"
            )
        size = self._latent_shape().numel()
        order = torch.arange(size) if order is None else torch.as_tensor(order)
        if order.shape != (size,) or not torch.equal(order.sort().values, torch.arange(size)):
            raise ValueError(
                f"order: expected each of 0 to {size - 1} once, got a tensor of shape {tuple(order.shape)}"
            )
        self.register_buffer("order", order.clone())
        self.index_prob, self.reconstruction_weight = index_prob, reconstruction_weight
        slow = {
            type(part).__name__
            for part in self.modules()
            if isinstance(part, FlowTransform) and part.inverts_iteratively
        }
        if slow:
            warnings.warn(
                f"{', '.join(sorted(slow))}: one direction takes up to {size} sweeps or finds roots, and the penalty of nested "
                "dropout runs both directions in every step; coupling and linear transforms take one pass each way",
                stacklevel=2,
            )

    def project(self, x: Tensor, k: int | Tensor) -> Tensor:
        """P_k f⁻¹(x): the latents with all but the first k set to 0. `k` is an integer or broadcasts to `(*)`."""
        self._check_value(x)
        return self._keep(self._at_batch()[1].inv(x), k)

    def reconstruct(self, x: Tensor, k: int | Tensor) -> Tensor:
        """f(P_k f⁻¹(x)): the reconstruction of x from its first k latents, of the shape of x."""
        return self._at_batch()[1](self.project(x, k))

    @torch.no_grad()
    def reconstruction_curve(
        self, x: Tensor, ks: Sequence[int] | None = None, chunk_size: int = 1000
    ) -> Tensor:
        """Mean squared error of reconstruction, by element and datum.

        Args:
            x: `(N, *event_shape)`.
            ks: numbers of latents; 1 to D by default.
            chunk_size: rows at a time.

        Returns:
            `(len(ks))`. Cost: one inverse pass, and a forward pass for each k.
        """
        self._check_value(x)
        ks = range(1, len(self.order) + 1) if ks is None else ks
        transform = self._at_batch()[1]
        errors = []
        for rows in x.split(chunk_size):
            z = transform.inv(rows)
            error = [(transform(self._keep(z, k)) - rows).square().sum() for k in ks]
            errors.append(torch.stack(error))
        return torch.stack(errors).sum(0) / x.numel()

    @torch.no_grad()
    def sample_truncated(self, k: int, sample_shape: Any = ()) -> Tensor:
        """Draws from the manifold of the first k latents: f(P_k z), z from the base."""
        base, transform, _ = self._at_batch()
        return transform(self._keep(base.sample(torch.Size(sample_shape)), k))

    def penalty(self, x: Tensor, k: Tensor | None = None) -> Tensor:
        """λ ‖x - f(P_k f⁻¹(x))‖², `(*)`, with one k for each datum, drawn by default; in standardised units if any."""
        self._check_value(x)
        return self._penalty(x, self._at_batch()[1].inv(x), k)

    def objective(self, value: Tensor, k: Tensor | None = None) -> Tensor:
        """log p(value) - penalty(value, k), `(*)`, the objective of training; one pass in each direction, for λ = 0 one."""
        z, log_p = self._pull_and_score(value)
        return log_p - self._penalty(value, z, k) if self.reconstruction_weight else log_p

    def sample_index(self, shape: Sequence[int] = ()) -> Tensor:
        """k, geometric from 1, at most D: `shape`."""
        u = torch.rand(tuple(shape), dtype=torch.float64, device=self.order.device)
        k = 1 + ((-u).log1p() / math.log1p(-self.index_prob)).floor()
        return k.clamp(max=len(self.order)).long()

    def observe(self, name: str, x: Tensor) -> Tensor:
        """The observation of x under `name`, and minus the penalty as the factor `{name}_penalty`; call inside x's plate."""
        self._check_value(x)
        z = self._at_batch()[1].inv(x)
        # The site is scored later: the transform's cache holds its pass as long as z is alive.
        value = pyro.sample(name, self._view(self.batch_shape, _latent=z), obs=x)
        pyro.factor(f"{name}_penalty", -self._penalty(x, z))
        return value

    def _penalty(self, x: Tensor, z: Tensor, k: Tensor | None = None) -> Tensor:
        """The penalty of x, whose latents are z."""
        batch = self._check_value(x)
        if k is None:
            k = self.sample_index(batch)
        # Not through the cache, which holds a single pass, that of z.
        reconstruction = self._at_batch()[1].forward_and_ladj(self._keep(z, k))[0]
        error = reconstruction - x
        if self.standardization is not None:
            error = error / self.standardization.scale
        return self.reconstruction_weight * error.square().flatten(len(batch)).sum(-1)

    def _keep(self, z: Tensor, k: int | Tensor) -> Tensor:
        shape = self._latent_shape()
        if isinstance(k, int) and not 0 <= k <= len(self.order):
            raise ValueError(f"k: expected an integer from 0 to {len(self.order)}, got {k}")
        k = torch.as_tensor(k, device=z.device)
        rank = self.order.argsort().reshape(shape)
        return torch.where(rank < k.reshape(*k.shape, *[1] * len(shape)), z, 0.0)

    def _latent_shape(self) -> torch.Size:
        return self._at_batch()[0].event_shape
