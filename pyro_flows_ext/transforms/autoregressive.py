"""Autoregressive flows, affine, by splines, or by any elementwise map; IAF in one orientation, MAF in the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from typing_extensions import Unpack

from ..nn import MADE
from ..ops import check_context_dim, check_positive, fused, triangular_fixed_point
from .base import FlowTransform
from .fused_affine import Network
from .scores import by_triangle, residual
from .transformers import IN_ONE, Transformer, check_transformer


class MADEOptions(TypedDict, total=False):
    """Keywords of the network of an autoregressive flow: see `nn.MADE`."""

    order: Sequence[int] | None
    activation: Callable[[], nn.Module]
    residual: bool


class Autoregressive(FlowTransform):
    """y_i = g(x_i; θ_i) with θ_i a function of the x_j before i and of the context; log|det| = Σ_i log g'(x_i; θ_i), exact.

    The θ_i of all i come from one masked network, which starts at zero, and the transform at g(·; 0) with it.

    The forward direction is one pass of the network. The inverse finds one variable after the other, each unit of the
    network computed once: half the products of a pass, and D calls of g⁻¹. For few rows, on a GPU, and with a g or an
    activation of your own it sweeps x <- g⁻¹(y; θ(x)) over all variables at once, until nothing changes, D times at
    most: see `ops.triangular_fixed_point`. 10 to 25 sweeps are usual for D = 64. Gradients through the inverse are
    implicit, so that their memory does not grow with D, and second derivatives need `torch.func`. Under
    `torch.compile` and `torch.func` the inverse takes D sweeps with a graph.

    So `TransformedDistribution(base, [t])` samples fast and scores its own samples at no cost (IAF, for guides), and
    `TransformedDistribution(base, [t.inv])` scores any value fast (MAF, for data), as Pyro's own classes do.

    Args:
        input_dim: D, for events `(*, D)`.
        hidden_dims: widths of the network; two layers of max(64, 2D) by default.
        transformer: g; `Affine()` by default. See `Transformer`.
        context_dim: number of context variables that the network reads.
        options: `order`, `activation` and `residual` of `nn.MADE`.

    Raises:
        ValueError: if `order` is not a permutation, or in a pass if the last dimension is not D.
        TypeError: if `transformer` is not a `Transformer`.

    Example:
        >>> iaf_layer = Autoregressive(3, (32, 32))
        >>> maf_layer = Autoregressive(3, transformer=RationalQuadratic(), order=[2, 1, 0]).inv

    References:
        Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow; Papamakarios, Pavlakou &
        Murray 2017, Masked Autoregressive Flow for Density Estimation; Durkan et al. 2019, Neural Spline Flows.
    """

    inverts_iteratively = True
    carries_scores = True

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        transformer: Transformer | None = None,
        context_dim: int = 0,
        **options: Unpack[MADEOptions],
    ):
        super().__init__()
        self.input_dim = check_positive("input_dim", input_dim)
        self.context_dim = check_context_dim(context_dim)
        self.transformer = check_transformer(transformer)
        self.net = MADE(
            self.input_dim,
            self.transformer.num_params,
            hidden_dims,
            context_dim=self.context_dim,
            **options,
        )
        # That of the network, where the layer may run as one operation.
        self._width = self.net.width if type(self.transformer) in IN_ONE else 0

    @constraints.dependent_property
    def domain(self) -> Constraint:
        domain = self.transformer.domain
        return (
            constraints.real_vector
            if domain is constraints.real
            else constraints.independent(domain, 1)
        )

    @constraints.dependent_property
    def codomain(self) -> Constraint:
        return self.domain

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        # Written out, and not a call: small networks notice one.
        if self._width and x.numel() * self._width >= fused.MIN_NUMEL * x.shape[-1]:
            layers = self.net.layers_at(self.context)
            if layers is not None:
                found = self.transformer.layer(x, None, Network(*layers), inverse=False)
                if found is not None:
                    return found
        y, log_slope = self.transformer.forward(x, self.net.bind(self.context)(x))
        return y, log_slope.sum(-1)

    def forward_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check_input("x", x)
        y, log_slope = self.transformer.forward(x, self.net.bind(self.context)(x))
        ladj = log_slope.sum(-1)
        score = by_triangle(x, y, log_slope.detach().exp(), residual(x, ladj, score))
        return y, ladj, score

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        conditioner = self.net.bind(self.context)

        def sweep(x: Tensor) -> tuple[Tensor, Tensor]:
            x, log_slope = self.transformer.inverse(y, conditioner(x))
            return x, log_slope.sum(-1).expand(x.shape[:-1])

        def substitute() -> tuple[Tensor, Tensor] | None:
            # A variable at a time, all rows in the dimension of elements: their parameters are contiguous then.
            solve, context = self.transformer.inverse, self.context
            return self.net.substitute(y, solve, context) if self.transformer.is_uniform else None

        # The first sweep is over one row of zeros, which costs the network next to nothing.
        start = y.new_zeros((1,) * (y.dim() - 1) + (self.input_dim,))
        return triangular_fixed_point(sweep, start, self.input_dim, substitute)

    def extra_repr(self) -> str:
        return f"{self.input_dim}, transformer={self.transformer!r}"
