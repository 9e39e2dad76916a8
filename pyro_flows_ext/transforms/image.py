"""Maps that prepare images, and vectors of data, for a flow: squeezing, logits, standardisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.constraints import Constraint
from typing_extensions import Self

from ..ops import check_event_dim, check_positive
from .base import IMAGE, FlowTransform
from .normalization import ActNorm


class Squeeze(FlowTransform):
    """Space to depth: blocks of factor x factor pixels become channels, `(*, C, H, W)` -> `(*, C f², H / f, W / f)`.

    y[c f² + i f + j, h, w] = x[c, h f + i, w f + j]; log|det| = 0: elements move and do not change. `.inv` is depth to
    space. `sign` is 1, or 0, for not known, where the parity depends on the size of the image (f = 3, 7, 11, ...).

    Args:
        factor: f.

    Raises:
        ValueError: if f does not divide H or W, and in the inverse if f² does not divide the channels.

    Example:
        >>> Squeeze(2)(torch.zeros(5, 1, 4, 6)).shape
        torch.Size([5, 4, 2, 3])

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP, sec. 3.6.
    """

    domain = codomain = IMAGE

    def __init__(self, factor: int = 2):
        super().__init__()
        self.factor = check_positive("factor", factor)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.forward_shape(x.shape)
        f = self.factor
        blocks = x.unflatten(-1, (-1, f)).unflatten(-3, (-1, f))  # (*, C, H / f, f, W / f, f)
        y = blocks.movedim((-3, -1), (-4, -3)).flatten(-5, -3)
        return y, x.new_zeros(x.shape[:-3])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self.inverse_shape(y.shape)
        blocks = y.unflatten(-3, (-1, self.factor, self.factor))
        x = blocks.movedim((-4, -3), (-3, -1)).flatten(-2).flatten(-3, -2)
        return x, y.new_zeros(y.shape[:-3])

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        f = self.factor
        if len(shape) < 3 or shape[-2] % f or shape[-1] % f:
            raise ValueError(
                f"{self}: expected a shape (*, C, H, W) with H and W divisible by {f}, got {tuple(shape)}"
            )
        *batch, C, H, W = shape
        return torch.Size((*batch, C * f * f, H // f, W // f))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        f = self.factor
        if len(shape) < 3 or shape[-3] % f**2:
            raise ValueError(
                f"{self}.inv: expected a shape (*, C, H, W) with C divisible by {f * f}, got {tuple(shape)}"
            )
        *batch, C, H, W = shape
        return torch.Size((*batch, C // f**2, H * f, W * f))

    @property
    def sign(self) -> int:
        # The parity is a product of binomials of f and of the image's sizes, each of which f or C(f, 2) multiplies.
        return 0 if self.factor % 4 == 3 else 1

    def extra_repr(self) -> str:
        return f"{self.factor}"


class LogitPreprocess(FlowTransform):
    """y = logit(s) with s = α + (1 - 2α) x: data in [0, 1] to the real line, with no pole at 0 and 1.

    log|det| = Σ log(1 - 2α) - log s - log(1 - s), exact. Forward maps data, so that a density of data ends in the
    inverse: `TransformedDistribution(base, [..., LogitPreprocess().inv])`.

    Data fill |y| <= logit(1 - α) only. A flow reaches the rest of the line too, which the inverse maps to values up to
    α / (1 - 2α) outside [0, 1]: the domain is that wider interval, so that every draw can be scored. Clamp draws to
    show them. Beyond the domain the forward map is NaN.

    Args:
        alpha: α in (0, 1/2); .05 is customary for natural images, 1e-6 for MNIST.
        event_dim: number of event dimensions, 3 for images, 1 for vectors.

    Raises:
        ValueError: unless 0 < alpha < 1/2 and `event_dim` is positive.

    Example:
        >>> LogitPreprocess(1e-6)(torch.full((1, 2, 2), 0.5)).sum().item()
        0.0

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP, sec. 4.1; Papamakarios et al. 2017,
        Masked Autoregressive Flow for Density Estimation.
    """

    def __init__(self, alpha: float = 0.05, event_dim: int = 3):
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha: expected a number between 0 and 1/2, got {alpha!r}")
        self.alpha, self._event_dim = float(alpha), check_positive("event_dim", event_dim)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event_dim("x", x, self._event_dim)
        a, slope = self.alpha, 1 - 2 * self.alpha
        # 1 - s by its own formula: near x = 1 the difference would keep few digits of a small α.
        log_s, log_rest = (a + slope * x).log(), (a + slope * (1 - x)).log()
        ladj = math.log(slope) - log_s - log_rest
        return log_s - log_rest, _sum(ladj, self._event_dim)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event_dim("y", y, self._event_dim)
        a, slope = self.alpha, 1 - 2 * self.alpha
        ladj = F.logsigmoid(y) + F.logsigmoid(-y) - math.log(slope)
        return (y.sigmoid() - a) / slope, _sum(ladj, self._event_dim)

    @constraints.dependent_property
    def domain(self) -> Constraint:
        reach = self.alpha / (1 - 2 * self.alpha)
        return constraints.independent(constraints.interval(-reach, 1 + reach), self._event_dim)

    @constraints.dependent_property
    def codomain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, event_dim={self._event_dim}"


class Standardize(FlowTransform):
    """y = (x - loc) / scale with fixed moments of the data; log|det| = -Σ log scale over the event, exact.

    Forward maps data, so that a density of data ends in the inverse: `TransformedDistribution(base, [..., t.inv])`.
    `from_data` takes the moments from data. Cost: O(D) in both directions.

    Args:
        loc, scale: buffers of the shape of the event, or one that broadcasts to it: `(C, 1, 1)` for images by channel.
        event_dim: number of event dimensions; that of `loc` by default.

    Raises:
        ValueError: if the moments do not fit together or the event, are not finite, or a scale is not positive.

    Example:
        >>> Standardize.from_data(torch.tensor([[0.0], [2.0]]))(torch.tensor([3.0]))
        tensor([2.])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, event_dim: int | None = None):
        super().__init__()
        event_dim = loc.dim() if event_dim is None else event_dim
        self._event_dim = check_positive("event_dim", event_dim)
        if loc.shape != scale.shape or loc.dim() > event_dim:
            raise ValueError(
                f"loc, scale: expected the same shape, of at most {event_dim} dimensions, got {tuple(loc.shape)} and "
                f"{tuple(scale.shape)}"
            )
        if not bool((loc.isfinite() & scale.isfinite() & (scale > 0)).all()):
            raise ValueError("loc, scale: expected finite values, and scales above 0")
        pad = (None,) * (event_dim - loc.dim())
        self.register_buffer("loc", loc.detach()[pad].clone())
        self.register_buffer("scale", scale.detach()[pad].clone())

    @classmethod
    def from_data(cls, data: Tensor, event_dim: int = 1, *, per_channel: bool = False) -> Self:
        """Returns the transform that maps data to mean 0 and sd 1, by element or by the first dimension of the event.

        Elements that are constant to rounding keep their scale, as in `ActNorm`.

        Args:
            data: `(*, event)`, two rows or more.
            event_dim: number of event dimensions.
            per_channel: whether all pixels of a channel share one mean and sd, for events `(C, H, W)`.

        Raises:
            ValueError: for fewer than two rows, or values that are not finite.
        """
        check_event_dim("data", data, check_positive("event_dim", event_dim))
        event = data.shape[-event_dim:]
        if per_channel:
            data = data.movedim(-event_dim, -1)
            event = torch.Size((event[0], *[1] * (event_dim - 1)))
        moments = ActNorm(event.numel()).to(data)
        moments.initialize(data.reshape(-1, event.numel()), inverse=True)
        return cls(moments.loc.reshape(event), moments.log_scale.exp().reshape(event), event_dim)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj = self._ladj("x", x)
        return (x - self.loc) / self.scale, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        ladj = self._ladj("y", y)
        return self.loc + self.scale * y, -ladj

    def _ladj(self, name: str, x: Tensor) -> Tensor:
        check_event_dim(name, x, self._event_dim)
        batch, event = x.shape[: -self._event_dim], x.shape[-self._event_dim :]
        if any(a not in (1, b) for a, b in zip(self.loc.shape, event, strict=True)):
            raise ValueError(
                f"{name}: expected an event that loc of shape {tuple(self.loc.shape)} broadcasts to, got {tuple(x.shape)}"
            )
        return -self.scale.log().expand(event).sum().expand(batch)

    @constraints.dependent_property
    def domain(self) -> Constraint:
        return constraints.independent(constraints.real, self._event_dim)

    @constraints.dependent_property
    def codomain(self) -> Constraint:
        return self.domain

    def extra_repr(self) -> str:
        return f"{tuple(self.loc.shape)}"


def _sum(x: Tensor, event_dim: int) -> Tensor:
    return x.sum(tuple(range(-event_dim, 0)))
