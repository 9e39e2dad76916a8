"""The flows of the field by name: stacks of transforms, ready to use.

Every preset takes the dimension, then keywords: `num_layers`, how often its step is repeated; `hidden_dims`, of the
networks inside; `context_dim`, and what else its transforms take. It gives a `ComposeFlow`, or with `context_dim` a
`ConditionalComposeFlow`, whose `condition(context)` does: one module, with its layers in `flow[i]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pyro.distributions.conditional import ConditionalTransformModule

from ._constrain import check_positive
from .affine import ConditionalElementwiseAffine, ElementwiseAffine
from .autoregressive import (
    AffineAutoregressive,
    ConditionalAffineAutoregressive,
    ConditionalSplineAutoregressive,
    SplineAutoregressive,
)
from .base import FlowTransform
from .compose import ComposeFlow, ConditionalComposeFlow
from .conditional import ContextualFlow
from .coupling import (
    AdditiveCoupling,
    AffineCoupling,
    ConditionalAdditiveCoupling,
    ConditionalAffineCoupling,
    ConditionalSplineCoupling,
    SplineCoupling,
)
from .linear import LULinear
from .normalization import ActNorm
from .residual import ConditionalResidualFlow, ResidualFlow

# A `ComposeFlow`, or with a context a `ConditionalComposeFlow`: which, no type checker can read off the arguments
# without two signatures for every preset.
Flow = Any
Layer = FlowTransform | ConditionalTransformModule


def nice(
    input_dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int | None = None,
    **options: Any,
) -> Flow:
    """Additive couplings, the two halves in turn, and a scale by coordinate: the only one that changes volume.

    Exact, one network pass a layer in both directions. `options` as in `Coupling`. Raises `ValueError` for
    `input_dim` = 1. Source: Dinh, Krueger & Bengio 2014, NICE.
    """
    make = _layer(
        AdditiveCoupling, ConditionalAdditiveCoupling, input_dim, hidden_dims, context_dim
    )
    scale: Layer = (
        ElementwiseAffine(input_dim)
        if context_dim is None
        else ConditionalElementwiseAffine(input_dim, context_dim)
    )
    return _stack([*(make(flip=flip, **options) for flip in _flips(num_layers)), scale])


def realnvp(
    input_dim: int,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int | None = None,
    **options: Any,
) -> Flow:
    """Affine couplings, the two halves in turn: every pair of layers transforms every coordinate once.

    Exact, one network pass a layer in both directions. `options` as in `Coupling`. Raises `ValueError` for
    `input_dim` = 1. Source: Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP.
    """
    make = _layer(AffineCoupling, ConditionalAffineCoupling, input_dim, hidden_dims, context_dim)
    return _stack(make(flip=flip, **options) for flip in _flips(num_layers))


def glow_vector(
    input_dim: int,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int | None = None,
    initialize_on_first_batch: bool = False,
    **options: Any,
) -> Flow:
    """Steps of an affine coupling, an LU linear layer and an ActNorm: Glow without the images.

    The linear layers start at the identity, and the halves alternate. Exact, one network pass and O(D²) a step in both
    directions. `options` as in `Coupling`; `initialize_on_first_batch` as in `ActNorm`. Raises
    `ValueError` for `input_dim` = 1. Source: Kingma & Dhariwal 2018, Glow, sec. 3.
    """
    make = _layer(AffineCoupling, ConditionalAffineCoupling, input_dim, hidden_dims, context_dim)
    steps = [
        [
            make(flip=flip, **options),
            LULinear(input_dim),
            ActNorm(input_dim, initialize_on_first_batch=initialize_on_first_batch),
        ]
        for flip in _flips(num_layers)
    ]
    return _stack(layer for step in steps for layer in step)


def nsf(
    input_dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int | None = None,
    kind: str = "coupling",
    linear: bool = True,
    **options: Any,
) -> Flow:
    """Neural spline flow: layers of rational-quadratic splines with LU linear layers between them.

    `kind`: "coupling" (RQ-NSF (C): one network pass a layer in both directions), or "autoregressive" (RQ-NSF (AR): one
    pass from the data to the base, sweeps to sample, as in `maf`). In one dimension the couplings, which need
    two, give way to autoregressive layers. The linear layers start at the identity, and halves or orders alternate;
    `linear=False` leaves the linear layers out. Exact. `options` as in `SplineCoupling` or `SplineAutoregressive`:
    `num_bins`, `bound` and so on. Raises `ValueError` for another `kind`.
    Source: Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows.
    """
    if kind not in ("coupling", "autoregressive"):
        raise ValueError(f"kind: expected one of coupling, autoregressive; got {kind!r}")
    layers: list[Layer]
    if kind == "coupling" and input_dim > 1:
        make = _layer(
            SplineCoupling, ConditionalSplineCoupling, input_dim, hidden_dims, context_dim
        )
        layers = [make(flip=flip, **options) for flip in _flips(num_layers)]
    else:
        spline = SplineAutoregressive, ConditionalSplineAutoregressive
        make = _inverse(_layer(*spline, input_dim, hidden_dims, context_dim))
        layers = [make(order=o, **options) for o in _orders(input_dim, num_layers)]
    if linear:
        layers = [part for layer in layers for part in (LULinear(input_dim), layer)][1:]
    return _stack(layers)


def maf(
    input_dim: int,
    *,
    num_layers: int = 5,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int | None = None,
    **options: Any,
) -> Flow:
    """Masked autoregressive flow: affine autoregressive layers, in alternating order, fast from the data to the base.

    Exact. log_prob takes one network pass a layer, sampling takes sweeps: see `Autoregressive`. For data; `iaf` is
    the orientation for guides. `options` as in `nn.MADE`. Source: Papamakarios, Pavlakou & Murray 2017, Masked
    Autoregressive Flow for Density Estimation.
    """
    make = _inverse(_affine_autoregressive(input_dim, hidden_dims, context_dim))
    return _stack(make(order=o, **options) for o in _orders(input_dim, num_layers))


def iaf(
    input_dim: int,
    *,
    num_layers: int = 2,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int | None = None,
    **options: Any,
) -> Flow:
    """Inverse autoregressive flow: affine autoregressive layers, in alternating order, fast from the base to the data.

    Exact. Sampling, and scoring what was just sampled, takes one network pass a layer; scoring other values takes sweeps:
    see `Autoregressive`. For guides; `maf` is the orientation for data. `options` as in `nn.MADE`. Source: Kingma et
    al. 2016, Improving Variational Inference with Inverse Autoregressive Flow.
    """
    make = _affine_autoregressive(input_dim, hidden_dims, context_dim)
    return _stack(make(order=o, **options) for o in _orders(input_dim, num_layers))


def residual(
    input_dim: int,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int | None = None,
    **options: Any,
) -> Flow:
    """Residual flow: steps of an ActNorm and x + g(x) with g a contraction.

    One network pass a layer forward, a fixed point backward. The log-det is exact in eval mode for D <= 16 and an
    unbiased estimate otherwise: see `ResidualFlow`, also for `options`. Source: Chen, Behrmann, Duvenaud & Jacobsen
    2019, Residual Flows for Invertible Generative Modeling.
    """
    make = _layer(ResidualFlow, ConditionalResidualFlow, input_dim, hidden_dims, context_dim)
    steps = [
        [ActNorm(input_dim), make(**options)]
        for _ in range(check_positive("num_layers", num_layers))
    ]
    return _stack(layer for step in steps for layer in step)


# --- how they are put together ---


def _layer(
    plain: Callable[..., FlowTransform],
    contextual: type[ContextualFlow],
    input_dim: int,
    hidden_dims: Sequence[int] | None,
    context_dim: int | None,
) -> Callable[..., Layer]:
    """What makes one layer from its options: the plain transform, or with a context its conditional form."""

    def make(**options: Any) -> Layer:
        if context_dim is None:
            return plain(input_dim, hidden_dims, **options)
        return contextual(input_dim, context_dim, hidden_dims, **options)

    return make


def _inverse(make: Callable[..., Layer]) -> Callable[..., Layer]:
    return lambda **options: make(**options).inv


def _affine_autoregressive(
    input_dim: int, hidden_dims: Sequence[int] | None, context_dim: int | None
) -> Callable[..., Layer]:
    affine = AffineAutoregressive, ConditionalAffineAutoregressive
    return _layer(*affine, input_dim, hidden_dims, context_dim)


def _stack(layers: Iterable[Layer]) -> Flow:
    layers = list(layers)
    plain = [layer for layer in layers if isinstance(layer, FlowTransform)]
    return ComposeFlow(plain) if len(plain) == len(layers) else ConditionalComposeFlow(layers)


def _flips(num_layers: int) -> list[bool]:
    return [k % 2 == 1 for k in range(check_positive("num_layers", num_layers))]


def _orders(input_dim: int, num_layers: int) -> list[list[int]]:
    """Forwards and backwards in turn: what is last in one layer, and sees everything, is first in the next."""
    forwards = list(range(input_dim))
    return [forwards[::-1] if flip else forwards for flip in _flips(num_layers)]
