"""Densities with a latent variable, whose log-density is bounded by draws of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops import check_positive
from .base import Density


class BoundedDensity(Density):
    """A density p(x) = ∫ p(x, u) du, bounded by log p(x, u) - log q(u | x), u ~ q. A subclass defines `_log_weights`."""

    exact_log_prob = False

    def _log_weights(self, value: Tensor) -> Tensor:
        """log p(value, u) - log q(u | value) for one u ~ q by row: `(*, *event_shape)` -> `(*)`."""
        raise NotImplementedError(f"{type(self).__name__} must define _log_weights(value)")

    def log_prob(self, value: Tensor) -> Tensor:
        """Lower bound: log p(value, u) - log q(u | value) for one u ~ q: `(*, *event_shape)` -> `(*)`, in nats. Random.

        Its mean is the ELBO, below log p(value); its exponential is unbiased for p(value).
        """
        return self._log_weights(self._expanded(value))

    def log_prob_bound(
        self, value: Tensor, num_particles: int = 100, chunk_size: int | None = None
    ) -> Tensor:
        """Lower bound: log 1/K Σ_k p(value, u_k) / q(u_k | value), u_k ~ q, in nats. Random.

        Its mean grows with K to log p(value); its exponential is unbiased for p(value). Cost: K passes. Memory is that of
        one chunk: with several chunks and gradients, each chunk runs once more in the backward pass.

        Args:
            value: `(*, *event_shape)`.
            num_particles: K.
            chunk_size: passes at a time; all by default.

        Returns:
            `(*)`.
        """
        num_particles = check_positive("num_particles", num_particles)
        size = num_particles if chunk_size is None else check_positive("chunk_size", chunk_size)
        value = self._expanded(value)
        parts = []
        for start in range(0, num_particles, size):
            rows = value.expand(min(size, num_particles - start), *value.shape)
            if size < num_particles and torch.is_grad_enabled():
                parts.append(checkpoint(self._log_mass, rows, use_reentrant=False))
            else:
                parts.append(self._log_mass(rows))
        return torch.stack(parts).logsumexp(0) - math.log(num_particles)

    def _expanded(self, value: Tensor) -> Tensor:
        """The value at its full batch shape, so that every row has a latent of its own."""
        batch = self._check_value(value)
        if self._validate_args:
            self._validate_sample(value)
        return value.expand(batch + self.event_shape)

    def _log_mass(self, value: Tensor) -> Tensor:
        """log Σ_k of the weights of a value repeated K times, `(K, *, *event_shape)` -> `(*)`."""
        return self._log_weights(value).logsumexp(0)
