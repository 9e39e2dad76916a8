"""Autoregressive flows, affine and by splines; IAF in one orientation, MAF in the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from torch import Tensor, nn
from typing_extensions import Unpack

from ..nn import MADE
from ..ops import rq_spline, triangular_fixed_point
from ._constrain import bounded_affine, check_event, check_positive
from .base import FlowTransform
from .conditional import ContextualFlow


class AutoregressiveOptions(TypedDict, total=False):
    """Keywords that all autoregressive flows share, and hand to `nn.MADE`."""

    order: Sequence[int] | None
    activation: Callable[[], nn.Module]
    residual: bool


class SplineAutoregressiveOptions(AutoregressiveOptions, total=False):
    """Keywords of autoregressive flows of splines: see `SplineAutoregressive`."""

    num_bins: int
    bound: float


class Autoregressive(FlowTransform):
    """y_i = g(x_i; θ_i) with θ_i a function of the x_j before i; log|det| = Σ_i log g'(x_i; θ_i), exact.

    A subclass writes g, elementwise and increasing, in both directions (`_elementwise`) and says how many parameters
    it has. The θ_i of all i come from one masked network, which starts at zero, and the transform at the identity with
    it: see `nn.MADE` for `hidden_dims`, `order`, `activation`, `residual`. `context_dim` > 0 makes a layer that needs
    `with_context`: use the conditional classes.

    The forward direction is one pass of the network. The inverse sweeps x <- g⁻¹(y; θ(x)) over all variables at once,
    D times at most, until nothing changes: see `ops.triangular_fixed_point`. How many sweeps that takes depends on how
    long the chains of strong dependences are, not on D: 10 to 25 of 64 as a rule, nearly all of them where each
    variable is a wild function of the one before it. Gradients through the inverse are implicit: their memory does not
    grow with the sweeps, and second derivatives need `torch.func`.

    So `TransformedDistribution(base, [t])` samples fast and scores its own samples for free (the inverse
    autoregressive flow of Kingma et al. 2016, for guides), and `TransformedDistribution(base, [t.inv])` scores any
    value fast (the masked autoregressive flow of Papamakarios et al. 2017, for data). This is the convention of Pyro's
    own classes.

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Under `torch.compile` and `torch.func`, which cannot stop early, the
    inverse is D sweeps with a graph. Raises `ValueError` when the last dimension is not D, when `order` is no
    permutation, or when a context is needed and none was given.
    """

    def __init__(
        self,
        input_dim: int,
        num_params: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        context_dim: int = 0,
        **options: Unpack[AutoregressiveOptions],
    ):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.context_dim = context_dim
        self.net = MADE(self.input_dim, num_params, hidden_dims, context_dim=context_dim, **options)

    def _elementwise(self, x: Tensor, theta: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """g or g⁻¹ at x `(*, D)` under θ `(*, P, D)`, and the logarithm of its derivative, `(*, D)` both."""
        raise TypeError(f"{type(self).__name__} must define _elementwise(x, theta, inverse)")

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_event("x", x, self.input_dim)
        y, log_slope = self._elementwise(x, self._conditioner()(x), inverse=False)
        return y, log_slope.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
        conditioner = self._conditioner()

        def sweep(x: Tensor) -> tuple[Tensor, Tensor]:
            x, log_slope = self._elementwise(y, conditioner(x), inverse=True)
            return x, log_slope.sum(-1).expand(x.shape[:-1])

        # The first sweep is over one row of zeros, which costs the network next to nothing.
        start = y.new_zeros((1,) * (y.dim() - 1) + (self.input_dim,))
        return triangular_fixed_point(sweep, start, self.input_dim)

    def _conditioner(self) -> Callable[[Tensor], Tensor]:
        """The network as a function of x alone."""
        return self.net.bind(self._read_context())

    def extra_repr(self) -> str:
        return f"{self.input_dim}"


class AffineAutoregressive(Autoregressive):
    """y_i = μ_i + σ_i x_i, with μ_i and σ_i functions of the x_j before i; log|det| = Σ log σ_i: an `Autoregressive`.

    |log σ_i| < log 1000 for any parameter value.

    Source: Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow; Papamakarios, Pavlakou
    & Murray 2017, Masked Autoregressive Flow for Density Estimation.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        context_dim: int = 0,
        **options: Unpack[AutoregressiveOptions],
    ):
        super().__init__(input_dim, 2, hidden_dims, context_dim=context_dim, **options)

    def _elementwise(self, x: Tensor, theta: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, raw = theta.unbind(-2)
        return bounded_affine(x, shift, raw, inverse=inverse)


class SplineAutoregressive(Autoregressive):
    """y_i = g(x_i; θ_i), g a monotone rational-quadratic spline whose knots are functions of the x_j before i.

    log|det| = Σ log g', exact. Each g has `num_bins` bins on [-bound, bound] and is the identity outside: see
    `ops.rq_spline`. An `Autoregressive`. Raises `ValueError` unless `num_bins` and `bound` are positive.

    Source: Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows: RQ-NSF (AR).
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        num_bins: int = 8,
        bound: float = 3.0,
        context_dim: int = 0,
        **options: Unpack[AutoregressiveOptions],
    ):
        num_bins = check_positive("num_bins", num_bins)
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        num_params = 3 * num_bins - 1
        super().__init__(input_dim, num_params, hidden_dims, context_dim=context_dim, **options)
        self.num_bins, self.bound = num_bins, float(bound)

    def _elementwise(self, x: Tensor, theta: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return rq_spline(x, theta.mT, bound=self.bound, inverse=inverse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_bins={self.num_bins}, bound={self.bound:g}"


class ConditionalAffineAutoregressive(ContextualFlow):
    """`AffineAutoregressive` whose network also sees a context `(*, C)`; `.condition(context)` gives the transform."""

    base = AffineAutoregressive


class ConditionalSplineAutoregressive(ContextualFlow):
    """`SplineAutoregressive` whose network also sees a context `(*, C)`; `.condition(context)` gives the transform."""

    base = SplineAutoregressive


def affine_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[AutoregressiveOptions],
) -> AffineAutoregressive:
    """An affine autoregressive flow, fast forward (IAF); `.inv` is fast backward (MAF): see `AffineAutoregressive`."""
    return AffineAutoregressive(input_dim, hidden_dims, **options)


def spline_autoregressive(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[SplineAutoregressiveOptions],
) -> SplineAutoregressive:
    """An autoregressive flow of splines, fast forward; `.inv` is fast backward: see `SplineAutoregressive`."""
    return SplineAutoregressive(input_dim, hidden_dims, **options)


def conditional_affine_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[AutoregressiveOptions],
) -> ConditionalAffineAutoregressive:
    """An affine autoregressive flow amortized over a context: see `ConditionalAffineAutoregressive`."""
    return ConditionalAffineAutoregressive(input_dim, context_dim, hidden_dims, **options)


def conditional_spline_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Unpack[SplineAutoregressiveOptions],
) -> ConditionalSplineAutoregressive:
    """An autoregressive flow of splines amortized over a context: see `ConditionalSplineAutoregressive`."""
    return ConditionalSplineAutoregressive(input_dim, context_dim, hidden_dims, **options)
