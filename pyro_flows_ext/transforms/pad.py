"""Padding with further dimensions, for augmented flows: a step in front of a transform."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from ..ops import broadcast_shapes, check_event_dim, check_positive


class Pad:
    """(x, ε) with ε ~ q(ε | x): data with `num_pad` further elements, or for images `(C, H, W)` further channels.

    Not a `FlowTransform`: z = (x, ε) has more dimensions than x, so the map has no Jacobian determinant. A flow over z
    gives a lower bound on the density of x, by Jensen's inequality:

        log p(x) = log ∫ p(x, ε) dε >= E_q[log p(x, ε) - log q(ε | x)],  with equality for q(ε | x) = p(ε | x).

    With `padded, log_q = pad.pad(x)`, the mean of `flow.log_prob(padded) - log_q` is an unbiased estimate of the
    right-hand side, and the mean of its exponential one of p(x). Draws of x: `pad.unpad(flow.sample())`.

    Args:
        num_pad: number of elements or channels to add.
        kind: "gaussian", or "zero" for zeros. The latter lie on a set of measure zero, where a density has no maximum:
            for comparisons only, without a log q.
        event_dim: 1 for vectors, 3 for images.

    Raises:
        ValueError: for another kind or event_dim.

    Example:
        >>> padded, log_q = Pad(2).pad(torch.zeros(5, 3))
        >>> padded.shape, log_q.shape
        (torch.Size([5, 5]), torch.Size([5]))

    References:
        Huang, Dinh & Courville 2020, Augmented Normalizing Flows; zero against Gaussian padding: Koehler, Mehta &
        Risteski 2021, Representational aspects of depth and conditioning in normalizing flows.
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
        """Returns (x, ε) `(*, D + num_pad)` and log q(ε | x) `(*)` in nats, None for zeros.

        Args:
            x: `(*, D)`, or images `(*, C, H, W)`.
            noise: the value of ε, drawn from q by default; further leading dimensions are further draws for the same x.
            distribution: q(ε | x), of events `(num_pad,)` (images: `(num_pad, H, W)`), standard normal by default; it
                may have parameters, and depend on x by its batch.

        Raises:
            ValueError: if shapes do not fit, or if `noise` or `distribution` comes with zeros.
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
        q = distribution.expand(broadcast_shapes(batch, distribution.batch_shape))
        noise = q.rsample() if noise is None else noise
        if noise.shape[-self.event_dim :] != event:
            raise ValueError(
                f"noise: expected shape (*, {', '.join(map(str, event))}), got {tuple(noise.shape)}"
            )
        batch = broadcast_shapes(q.batch_shape, noise.shape[: -self.event_dim])
        x = x.expand(batch + x.shape[-self.event_dim :])
        noise = noise.expand(batch + event)
        return torch.cat([x, noise], -self.event_dim), q.log_prob(noise)

    def unpad(self, z: Tensor) -> Tensor:
        """Returns the x of (x, ε), `(*, D + num_pad)` -> `(*, D)`; raises `ValueError` if nothing would be left."""
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
