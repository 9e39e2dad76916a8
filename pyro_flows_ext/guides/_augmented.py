"""Guides whose density is known of the latents with auxiliary variables alone, and reverse models to take those out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..ops import check_positive
from ..transforms import FlowTransform
from .base import AutoFlow


class AugmentedFlow(FlowTransform):
    """noise -> (z, u): latents z `(*, D)` and auxiliary variables u as one flow, with log r(u | z) from the same pass.

    Of vectors `(*, input_dim)`, the first D = `latent_dim` numbers being z; log|det| exact. A subclass writes `_push`
    and `_pull`. A pass is remembered with its log r.
    """

    latent_dim: int
    input_dim: int

    def _push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y `(*, input_dim)`; log|det| and log r, `(2, *)`."""
        raise TypeError(f"{type(self).__name__} must define _push(x)")

    def _pull(self, z: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """The noise x that gives (z, rest); log|det| of the inverse and log r, `(2, *)`. None: `rest` is drawn from r."""
        raise TypeError(f"{type(self).__name__} must define _pull(z, rest)")

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (ladj, _) = self._push(x)
        return y, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, (ladj, _) = self._pull(*self._split("y", y))
        return x, ladj

    def pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Noise that gives z `(*, D)`, with u from r; log|det| of the inverse and log r, `(2, *)`."""
        return self._pull(z, None)

    def log_reverse(self, y: Tensor) -> Tensor:
        """log r(u | z) of y = (z, u): `(*)`, free where y comes from the last pass."""
        if (hit := self._lookup(y=y)) is not None:
            return hit[2][1]
        return self._pull(*self._split("y", y))[1][1]

    def log_prob_bound(self, base: Any, z: Tensor, num_particles: int) -> Tensor:
        """log 1/K Σ_k base(x_k) |det ∂x_k/∂(z, u_k)| / r(u_k | z), u_k ~ r: `(*, D)` -> `(*)`, K = `num_particles`. Random.

        Its mean is below log q(z) for noise x ~ `base`, and rises to it with K.
        """
        num_particles = check_positive("num_particles", num_particles)
        noise, (ladj, log_r) = self.pull(z.expand(num_particles, *z.shape))
        return (base.log_prob(noise) + ladj - log_r).logsumexp(0) - math.log(num_particles)

    def _split(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(name, x)
        return x[..., : self.latent_dim], x[..., self.latent_dim :]

    # The cache holds log|det| and log r of a pass as one tensor.

    def __call__(self, x: Tensor) -> Tensor:
        if (hit := self._lookup(x=x)) is not None:
            return hit[1]
        y, terms = self._push(x)
        self._store(x, y, terms, is_forward=True)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        if (hit := self._lookup(y=y)) is not None:
            return hit[0]
        x, (ladj, log_r) = self._pull(*self._split("y", y))
        self._store(y, x, torch.stack([-ladj, log_r]), is_forward=False)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if (hit := self._lookup(x=x, y=y)) is not None:
            return hit[2][0]
        return self.forward_and_ladj(x)[1]


class AugmentedGuide(AutoFlow):
    """A guide q(z, u) of the latents z and auxiliary variables u, with a reverse model r(u | z): see `AugmentedFlow`.

        ELBO = E_q(z,u) [log p(x, z) + log r(u | z) - log q(z, u)]  <=  log p(x).

    In Pyro an auxiliary site `_{name}_latent` holds (z, u), and a factor `_{name}_r` is -log r.
    """

    exact_log_prob = False

    @property
    def _flow(self) -> Any:
        self._require_setup()
        return self.transform

    # --- the AutoContinuous protocol ---

    def get_base_dist(self) -> dist.TorchDistribution:
        """N(0, I) on all numbers of the noise."""
        zeros = self.whitening.loc.new_zeros(self._flow.input_dim)
        return dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """Raises `TypeError`: no one map takes noise to the latents."""
        raise TypeError(
            f"{type(self).__name__}: the latents come with auxiliary variables, and no one transform takes noise to "
            "them alone, as NeuTra needs; use AutoFlow"
        )

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """q(z, u), of the unconstrained latents together with the auxiliary variables."""
        return dist.TransformedDistribution(self.get_base_dist(), self._flow)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Samples latents and auxiliary variables, weighs them by 1 / r(u | z), and returns the latents, `(*, D)`."""
        latent = super().sample_latent(*args, **kwargs)
        log_r = self._flow.log_reverse(latent)
        with Messenger():  # Pyro warns of observed sites outside of every handler, as when the guide is called to draw
            pyro.factor(f"_{self._pyro_name}_r", -log_r, has_rsample=True)
        return latent[..., : self.latent_dim]

    def log_prob(self, samples: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Raises `TypeError`: log q(samples) is not known; `log_prob_bound` bounds it."""
        raise TypeError(
            f"{type(self).__name__}: log q(z) = log ∫ q(z, u) du is not known; use log_prob_bound, a lower bound, or "
            "for importance weights diagnostics.importance, which weighs latents and auxiliary variables together"
        )

    def log_prob_bound(
        self, samples: Mapping[str, Tensor], num_particles: int = 100, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Lower bound: log 1/K Σ_k q(samples, u_k) / r(u_k | samples), u_k ~ r, on log q, in constrained space.

        Site -> `(*, *shape)` gives `(*)`, in nats, K = `num_particles`. Random: its mean is below log q, and rises to
        it with K; the exponential is unbiased for q. -inf outside the support. Not for importance weights, which would
        come out too large. Raises `ValueError` when the sites or shapes do not fit.
        Cost: K inverse passes, in one batch.
        """
        latent, ladj, inside = self._unconstrain(samples, args, kwargs)
        bound = self._flow.log_prob_bound(self.get_base_dist(), latent, num_particles)
        return torch.where(inside, bound - ladj, -torch.inf)
