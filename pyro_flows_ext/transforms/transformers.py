"""Transformers: the elementwise maps of coupling and autoregressive layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from ..ops import (
    broadcast_shapes,
    check_positive,
    circular_rq_spline,
    fused,
    increasing_root,
    rq_spline,
)
from .bounds import bounded_affine, bounded_affine_by
from .fused_affine import Network, affine_layer
from .fused_spline import spline_layer


class Transformer(ABC):
    """y_i = g(x_i; θ_i), elementwise and increasing: g(·; 0) should be the identity, where training starts.

    A subclass sets `num_params` P, the number of parameters of one element, and writes `forward`. It may write
    `inverse` too; by default the inverse is a root of g, found by bracketed Newton, with exact gradients to third
    order. An `nn.Module` may be a transformer as well, and learns then.

    Example:
        >>> class Wave(Transformer):
        ...     num_params = 2
        ...
        ...     def forward(self, x, theta):
        ...         a, b = theta.unbind(-2)
        ...         a = 0.5 * a.tanh()
        ...         return x + a * (x + b).sin(), (a * (x + b).cos()).log1p()
        >>> layer = Coupling(4, transformer=Wave())
    """

    num_params: int
    # What x and y are; the elements that a coupling passes are of the same kind.
    domain: Any = constraints.real
    # Whether g is one map for all elements, so that they can be passed in any arrangement.
    is_uniform = False

    @abstractmethod
    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y = g(x; θ) and log g'(x; θ).

        Args:
            x: `(*, N)`.
            theta: `(*, P, N)`, broadcast against x.

        Returns:
            Two tensors `(*, N)`.
        """

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x = g⁻¹(y; θ) and log (g⁻¹)'(y; θ), both `(*, N)`: shapes as in `forward`."""

        def equation(x: Tensor) -> tuple[Tensor, Tensor]:
            value, log_slope = self.forward(x, theta)
            return value - y, log_slope.exp()

        batch = broadcast_shapes(y.shape[:-1], theta.shape[:-2])
        x = increasing_root(equation, y.expand(*batch, -1))
        return x, -self.forward(x, theta)[1]

    def layer(
        self, x: Tensor, columns: tuple[slice, slice] | None, network: Network, *, inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        """A coupling or an autoregressive layer in one operation, as `affine_layer`; None where there is no such operation."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Additive(Transformer):
    """y = x + t, log g' = 0: one parameter an element.

    References:
        Dinh, Krueger & Bengio 2014, NICE: Non-linear Independent Components Estimation.
    """

    num_params = 1
    is_uniform = True

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        y = x + theta.squeeze(-2)
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        x = y - theta.squeeze(-2)
        return x, torch.zeros_like(x)


class Affine(Transformer):
    """y = t + eˢ x, log g' = s: two parameters an element, with |s| < log 1000 for any parameter value.

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP.
    """

    num_params = 2
    is_uniform = True

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        if theta.numel() >= fused.MIN_NUMEL:
            return bounded_affine_by(x, theta, inverse=False)
        return bounded_affine(x, *theta.unbind(-2), inverse=False)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        if theta.numel() >= fused.MIN_NUMEL:
            return bounded_affine_by(y, theta, inverse=True)
        return bounded_affine(y, *theta.unbind(-2), inverse=True)

    def layer(
        self, x: Tensor, columns: tuple[slice, slice] | None, network: Network, *, inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        return affine_layer(x, columns, network, inverse=inverse)


class RationalQuadratic(Transformer):
    """A monotone rational-quadratic spline: `num_bins` K bins on [-bound, bound], the identity outside.

    3K - 1 parameters an element, both directions in closed form: see `ops.rq_spline`. The default of ±5
    contains a standard normal variable, with room for heavier tails: standardised data that are skewed or heavy-tailed
    are fitted better than with ±3, since values beyond the bound do not move.

    Args:
        num_bins: K.
        bound: half the width of the box, in units of the input.

    Raises:
        ValueError: unless `num_bins` and `bound` are positive.

    Example:
        >>> Autoregressive(3, transformer=RationalQuadratic(num_bins=4))
        Autoregressive(3, transformer=RationalQuadratic(num_bins=4, bound=5))

    References:
        Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows.
    """

    is_uniform = True

    def __init__(self, num_bins: int = 8, bound: float = 5.0):
        self.num_bins = check_positive("num_bins", num_bins)
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        self.bound = float(bound)
        self.num_params = 3 * self.num_bins - 1

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return rq_spline(x, theta.mT, bound=self.bound)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return rq_spline(y, theta.mT, bound=self.bound, inverse=True)

    def layer(
        self, x: Tensor, columns: tuple[slice, slice] | None, network: Network, *, inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        if x.numel() * self.num_params < fused.MIN_NUMEL:
            return None
        return spline_layer(
            x, columns, network, num_bins=self.num_bins, bound=self.bound, inverse=inverse
        )

    def __repr__(self) -> str:
        return f"RationalQuadratic(num_bins={self.num_bins}, bound={self.bound:g})"


# Those with a `layer`, unless a subclass changes them.
IN_ONE = (Affine, RationalQuadratic)

# The numbers of the circle, from -π to π.
CIRCLE = constraints.interval(-math.pi, math.pi)


class CircularSpline(Transformer):
    """A rational-quadratic spline on the circle [-π, π), and a turn: `num_bins` K bins, 3K + 1 parameters an element.

    Its log-slope is continuous at ±π, both directions are in closed form: see `ops.circular_rq_spline`. Networks that
    see angles should see their cosines and sines: `circular_nsf` is made so.

    Args:
        num_bins: K.

    Raises:
        ValueError: unless `num_bins` is positive.

    Example:
        >>> Coupling(2, transformer=CircularSpline(num_bins=4))
        Coupling(2, transformer=CircularSpline(num_bins=4), mask='half')

    References:
        Rezende et al. 2020, Normalizing Flows on Tori and Spheres, section 2.1.3.
    """

    domain = CIRCLE
    is_uniform = True

    def __init__(self, num_bins: int = 8):
        self.num_bins = check_positive("num_bins", num_bins)
        self.num_params = 3 * self.num_bins + 1

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return circular_rq_spline(x, theta.mT)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return circular_rq_spline(y, theta.mT, inverse=True)

    def __repr__(self) -> str:
        return f"CircularSpline(num_bins={self.num_bins})"


def check_transformer(transformer: Transformer | None) -> Transformer:
    """Returns the transformer, `Affine()` for None; raises `TypeError` for anything else."""
    if transformer is None:
        return Affine()
    if not isinstance(transformer, Transformer):
        raise TypeError(
            f"transformer: expected a Transformer, such as Affine() or RationalQuadratic(), got {transformer!r}"
        )
    return transformer
