"""Guides with auxiliary variables: an exact joint density, a reverse model, and a lower bound on the latents' density."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..ops import check_positive
from ..transforms import FlowTransform
from .base import FlowGuide


class AugmentedFlow(FlowTransform):
    """noise -> (z, u): latents z `(*, D)` and auxiliary variables u as one flow, with log r(u | z) from the same pass.

    Vectors are `(*, input_dim)`; the first D = `latent_dim` numbers are z; log|det| is exact. A subclass defines `_push`
    and `_pull`. The cache of the last pass includes its log r.
    """

    latent_dim: int
    input_dim: int

    @abstractmethod
    def _push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y `(*, input_dim)`; log|det| and log r, `(2, *)`."""

    @abstractmethod
    def _pull(self, z: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """The noise x of (z, rest); log|det| of the inverse and log r, `(2, *)`. If `rest` is None, it is drawn from r."""

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (ladj, _) = self._push(x)
        return y, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, (ladj, _) = self._pull(*self._split("y", y))
        return x, ladj

    def pull(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of (z, u) with z `(*, D)` given and u ~ r(u | z); log|det| of the inverse and log r, `(2, *)`."""
        return self._pull(z, None)

    def log_reverse(self, y: Tensor) -> Tensor:
        """log r(u | z) at y = (z, u): `(*)`, at no cost if y comes from the last pass."""
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


class AugmentedGuide(FlowGuide):
    """A guide q(z, u) of the latents z and auxiliary variables u, with a reverse model r(u | z): see `AugmentedFlow`.

        ELBO = E_q(z,u) [log p(x, z) + log r(u | z) - log q(z, u)]  <=  log p(x).

    In Pyro an auxiliary site `_{name}_latent` holds (z, u), and the log-density of a factor `_{name}_r` is -log r.
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
        """Raises `TypeError`: no transform maps noise to the latents alone."""
        raise TypeError(
            f"{type(self).__name__}: expected a guide with a transform from noise to the latents alone, as NeuTra needs, "
            "got one with auxiliary variables; use AutoFlow"
        )

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Samples latents and auxiliary variables, adds the factor 1 / r(u | z), and returns the latents, `(*, D)`."""
        latent = super().sample_latent(*args, **kwargs)
        log_r = self._flow.log_reverse(latent)
        with Messenger():  # Pyro warns of observed sites outside of every handler, as when the guide is called to draw
            pyro.factor(f"_{self._pyro_name}_r", -log_r, has_rsample=True)
        return latent[..., : self.latent_dim]

    def log_prob_bound(
        self, samples: Mapping[str, Tensor], num_particles: int = 100, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Lower bound: log 1/K Σ_k q(samples, u_k) / r(u_k | samples), u_k ~ r, on log q, in constrained space, in nats.

        Random: its mean is below log q, and rises to it with K; its exponential is unbiased for q. Not for importance
        weights, which would come out too large: `diagnostics.importance` weighs latents and auxiliary variables together.
        Cost: K inverse passes, in one batch.

        Args:
            samples: site -> `(*, *shape)`, any values.
            num_particles: K.
            args, kwargs: the model's arguments, for bounds that depend on them; those of the last call if there are none.

        Returns:
            `(*)`; -inf outside the support.

        Raises:
            ValueError: if the sites or shapes do not fit.
        """
        latent, ladj, inside = self._unconstrain(samples, args, kwargs)
        bound = self._flow.log_prob_bound(self.get_base_dist(), latent, num_particles)
        return torch.where(inside, bound - ladj, -torch.inf)

    def __getattr__(self, name: str) -> Any:
        if name == "log_prob":
            raise AttributeError(
                f"{type(self).__name__} has no log_prob, since log q(z) = log ∫ q(z, u) du is intractable: use log_prob_bound, a "
                "lower bound, or for importance weights diagnostics.importance, which weighs latents and auxiliary variables"
            )
        return super().__getattr__(name)
