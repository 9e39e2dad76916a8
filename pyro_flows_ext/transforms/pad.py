"""Padding with further dimensions, for augmented flows: no transform, but a step in front of one."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from ._constrain import check_event_dim, check_positive


class Pad:
    """(x, ε) with ε ~ q(ε | x): data with `num_pad` further elements, or for images `(C, H, W)` further channels.

    Not a `FlowTransform`: x has fewer dimensions than z = (x, ε), so that no Jacobian belongs to the map, and a flow
    over z gives a density of z alone. That bounds the density of x (a lower bound, from Jensen's inequality):

        log p(x) = log ∫ p(x, ε) dε >= E_q[log p(x, ε) - log q(ε | x)],  with equality for q(ε | x) = p(ε | x).

    With `padded, log_q = pad.pad(x)`, the mean of `flow.log_prob(padded) - log_q` over draws is an unbiased estimate of the
    right-hand side, and the average of its exponential over several draws, one of p(x). Draws of x: `pad.unpad(flow.sample())`.

    `kind="zero"` pads with zeros. These lie on a set of measure zero in the space of z: the flow's density there is
    that of a slice, not of x, and maximising it has no maximum (the flow can put all its mass on the slice), so that
    there is no log q and `log_q` is None. Good for nothing but comparisons: flows on zero padding become nearly singular.

    `event_dim`: 1 for vectors, 3 for images. Raises `ValueError` for another kind or event_dim.

    Source: Huang, Dinh & Courville 2020, Augmented Normalizing Flows; zero padding against Gaussian padding, Koehler,
    Mehta & Risteski 2021, Representational aspects of depth and conditioning in normalizing flows.
    """

    def __init__(self, num_pad: int, kind: str = "gaussian", *, event_dim: int = 1):
        if kind not in ("gaussian", "zero"):
            raise ValueError(f"kind: expected one of gaussian, zero; got {kind!r}")
        if event_dim not in (1, 3):
            raise ValueError(
                f"event_dim: expected 1 for vectors or 3 for images, got {event_dim!r}"
            )
        self.num_pad = check_positive("num_pad", num_pad)
        self.kind, self.event_dim = kind, event_dim

    def pad(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        *,
        distribution: dist.TorchDistribution | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x `(*, D)` -> (x, ε) `(*, D + num_pad)` and log q(ε | x) `(*)`, in nats; None for zeros.

        `distribution`: q(ε | x), of events `(num_pad,)` (images: `(num_pad, H, W)`), standard normal unless given; it may
        have parameters, and depend on x by its batch. `noise`: the value of ε, drawn from q by `rsample` unless given;
        further leading dimensions are further draws for the same x.
        Raises `ValueError` for shapes that do not fit, and for either argument with zeros.
        """
        batch, event = self._noise_shape(x)
        if self.kind == "zero":
            if noise is not None or distribution is not None:
                raise ValueError("noise, distribution: expected none for kind='zero'")
            return torch.cat([x, x.new_zeros(batch + event)], -self.event_dim), None
        if distribution is None:
            distribution = dist.Normal(x.new_zeros(event), 1.0).to_event(self.event_dim)
        if distribution.event_shape != event:
            raise ValueError(
                f"distribution: expected event_shape {tuple(event)}, got {tuple(distribution.event_shape)}"
            )
        q = distribution.expand(torch.broadcast_shapes(batch, distribution.batch_shape))
        noise = q.rsample() if noise is None else noise
        if noise.shape[-self.event_dim :] != event:
            raise ValueError(
                f"noise: expected shape (*, {', '.join(map(str, event))}), got {tuple(noise.shape)}"
            )
        batch = torch.broadcast_shapes(q.batch_shape, noise.shape[: -self.event_dim])
        x = x.expand(batch + x.shape[-self.event_dim :])
        noise = noise.expand(batch + event)
        return torch.cat([x, noise], -self.event_dim), q.log_prob(noise)

    def unpad(self, z: Tensor) -> Tensor:
        """The x of (x, ε): `(*, D + num_pad)` -> `(*, D)`. Raises `ValueError` when nothing would be left."""
        kept = (z.shape[-self.event_dim] if z.dim() >= self.event_dim else 0) - self.num_pad
        if kept < 1:
            raise ValueError(
                f"z: expected more than {self.num_pad} elements along dimension {-self.event_dim}, got shape {tuple(z.shape)}"
            )
        return z.narrow(-self.event_dim, 0, kept)

    def _noise_shape(self, x: Tensor) -> tuple[torch.Size, torch.Size]:
        """The shapes of the batch and of one ε."""
        check_event_dim("x", x, self.event_dim)
        cut = x.dim() - self.event_dim
        return x.shape[:cut], torch.Size((self.num_pad, *x.shape[cut + 1 :]))

    def __repr__(self) -> str:
        return f"Pad({self.num_pad}, kind={self.kind!r}, event_dim={self.event_dim})"
