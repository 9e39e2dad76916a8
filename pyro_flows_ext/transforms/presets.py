"""The flows of the field by name: stacks of transforms, ready to use.

Every preset takes the dimension, then keywords: `num_layers`, how often its step is repeated; `hidden_dims`, the widths of
the networks inside; `context_dim`, the number of context variables; and the keywords of its transforms. It returns a
`ComposeFlow`, one module with its layers in `flow[i]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from ..nn import AngleMLP
from ..ops import check_positive
from .affine import ElementwiseAffine
from .autoregressive import Autoregressive
from .base import FlowTransform
from .compose import ComposeFlow
from .coupling import Coupling
from .linear import LULinear
from .normalization import ActNorm
from .residual import ResidualFlow
from .transformers import Additive, CircularSpline, RationalQuadratic


def nice(
    input_dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    **options: Any,
) -> ComposeFlow:
    """Additive couplings, the two halves in turn, and a scale by coordinate, the only layer that changes volume.

    Exact, one network pass a layer in both directions.

    Args:
        input_dim: D >= 2.
        num_layers: number of couplings.
        hidden_dims, context_dim, options: as in `Coupling`.

    Example:
        >>> len(nice(3, num_layers=4))
        5

    References:
        Dinh, Krueger & Bengio 2014, NICE.
    """
    couplings = _couplings(
        input_dim, num_layers, hidden_dims, context_dim, transformer=Additive(), **options
    )
    return ComposeFlow([*couplings, ElementwiseAffine(input_dim, context_dim=context_dim)])


def realnvp(
    input_dim: int,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    **options: Any,
) -> ComposeFlow:
    """Affine couplings, the two halves in turn: every pair of layers transforms every coordinate once.

    Exact, one network pass a layer in both directions.

    Args:
        input_dim: D >= 2.
        num_layers: number of couplings.
        hidden_dims, context_dim, options: as in `Coupling`.

    Example:
        >>> flow = realnvp(3, num_layers=4, context_dim=2)
        >>> flow.condition(torch.zeros(5, 2)).batch_shape
        torch.Size([5])

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP.
    """
    return ComposeFlow(_couplings(input_dim, num_layers, hidden_dims, context_dim, **options))


def glow_vector(
    input_dim: int,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    initialize_on_first_batch: bool = False,
    **options: Any,
) -> ComposeFlow:
    """Steps of an affine coupling, an LU linear layer and an ActNorm: Glow without the images.

    The linear layers start at the identity, and the halves alternate. Exact, one network pass and O(D²) a step in both
    directions.

    Args:
        input_dim: D >= 2.
        num_layers: number of steps.
        hidden_dims, context_dim, options: as in `Coupling`.
        initialize_on_first_batch: as in `ActNorm`.

    Example:
        >>> len(glow_vector(3, num_layers=2))
        6

    References:
        Kingma & Dhariwal 2018, Glow, sec. 3.
    """
    parts: list[FlowTransform] = []
    for coupling in _couplings(input_dim, num_layers, hidden_dims, context_dim, **options):
        actnorm = ActNorm(input_dim, initialize_on_first_batch=initialize_on_first_batch)
        parts += [coupling, LULinear(input_dim), actnorm]
    return ComposeFlow(parts)


def nsf(
    input_dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    kind: str = "coupling",
    linear: bool = True,
    num_bins: int = 8,
    bound: float | None = None,
    **options: Any,
) -> ComposeFlow:
    """Neural spline flow: layers of rational-quadratic splines with LU linear layers between them.

    Exact. "coupling" (RQ-NSF (C)) takes one network pass a layer in both directions; "autoregressive" (RQ-NSF (AR)) one
    pass from the data to the base, and samples variable by variable, as `maf` does. The linear layers start at the
    identity, and halves or orders alternate.

    Args:
        input_dim: D. In one dimension autoregressive layers replace the couplings, which need two.
        num_layers: number of spline layers.
        kind: "coupling" or "autoregressive".
        linear: whether there are linear layers.
        num_bins, bound: as in `RationalQuadratic`; `bound` is 5 for couplings and 3 for autoregressive layers by default.
        hidden_dims, context_dim, options: as in `Coupling` or `Autoregressive`.

    Raises:
        ValueError: for another `kind`.

    Example:
        >>> [type(part).__name__ for part in nsf(3, num_layers=2)]
        ['Coupling', 'LULinear', 'Coupling']

    References:
        Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows.
    """
    if kind not in ("coupling", "autoregressive"):
        raise ValueError(f"kind: expected one of coupling, autoregressive; got {kind!r}")
    layers: Iterable[FlowTransform]
    if kind == "coupling" and input_dim > 1:
        options["transformer"] = RationalQuadratic(num_bins, 5.0 if bound is None else bound)
        layers = _couplings(input_dim, num_layers, hidden_dims, context_dim, **options)
    else:
        options["transformer"] = RationalQuadratic(num_bins, 3.0 if bound is None else bound)
        layers = [
            layer.inv
            for layer in _autoregressives(
                input_dim, num_layers, hidden_dims, context_dim, **options
            )
        ]
    if linear:
        layers = [part for layer in layers for part in (LULinear(input_dim), layer)][1:]
    return ComposeFlow(list(layers))


def circular_nsf(
    input_dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    num_bins: int = 8,
    **options: Any,
) -> ComposeFlow:
    """Neural spline flow on the torus [-π, π)^D: circular splines, whose networks see cosines and sines of angles.

    Exact, one network pass a layer in both directions. In one dimension the splines depend on the context alone.

    Args:
        input_dim: D, the number of angles.
        num_layers: number of couplings, the two halves in turn.
        hidden_dims, context_dim: as in `Coupling`.
        num_bins: as in `CircularSpline`.
        options: `activation` of the networks.

    Example:
        >>> flow = circular_nsf(2, num_layers=2)
        >>> flow(torch.tensor([3.0, -3.0])).abs().max() < 3.1416
        tensor(True)

    References:
        Rezende et al. 2020, Normalizing Flows on Tori and Spheres; Durkan et al. 2019, Neural Spline Flows.
    """
    spline = CircularSpline(num_bins)
    if input_dim == 1:
        return ComposeFlow(
            _autoregressives(1, num_layers, hidden_dims, context_dim, transformer=spline, **options)
        )
    widths = (64, 64) if hidden_dims is None else tuple(hidden_dims)
    parts = []
    for flip in _flips(num_layers):
        half = check_positive("input_dim", input_dim) // 2
        passed = input_dim - half if flip else half
        net = AngleMLP(
            passed,
            spline.num_params * (input_dim - passed),
            widths,
            context_dim=context_dim,
            zero_last=True,
            **options,
        )
        parts.append(
            Coupling(input_dim, transformer=spline, net=net, flip=flip, context_dim=context_dim)
        )
    return ComposeFlow(parts)


def maf(
    input_dim: int,
    *,
    num_layers: int = 5,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    **options: Any,
) -> ComposeFlow:
    """Masked autoregressive flow: affine autoregressive layers, in alternating order, fast from the data to the base.

    Exact. log_prob takes one network pass a layer, sampling goes variable by variable: see `Autoregressive`. For
    data; `iaf` is the orientation for guides.

    Args:
        input_dim: D.
        num_layers: number of layers.
        hidden_dims, context_dim, options: as in `Autoregressive`.

    Example:
        >>> len(maf(3))
        5

    References:
        Papamakarios, Pavlakou & Murray 2017, Masked Autoregressive Flow for Density Estimation.
    """
    layers = _autoregressives(input_dim, num_layers, hidden_dims, context_dim, **options)
    return ComposeFlow([layer.inv for layer in layers])


def iaf(
    input_dim: int,
    *,
    num_layers: int = 2,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    **options: Any,
) -> ComposeFlow:
    """Inverse autoregressive flow: affine autoregressive layers, in alternating order, fast from the base to the data.

    Exact. Sampling, and scoring the last sample, takes one network pass a layer; scoring other values goes variable by
    variable: see `Autoregressive`. For guides; `maf` is the orientation for data.

    Args:
        input_dim: D.
        num_layers: number of layers.
        hidden_dims, context_dim, options: as in `Autoregressive`.

    Example:
        >>> len(iaf(3))
        2

    References:
        Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow.
    """
    return ComposeFlow(_autoregressives(input_dim, num_layers, hidden_dims, context_dim, **options))


def residual(
    input_dim: int,
    *,
    num_layers: int = 8,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    **options: Any,
) -> ComposeFlow:
    """Residual flow: steps of an ActNorm and x + g(x) with g a contraction.

    One network pass a layer forward, a fixed point backward. The log-det is exact in eval mode for D <= 16 and an
    unbiased estimate otherwise: see `ResidualFlow`.

    Args:
        input_dim: D.
        num_layers: number of steps.
        hidden_dims, context_dim, options: as in `ResidualFlow`.

    Example:
        >>> len(residual(3, num_layers=2))
        4

    References:
        Chen, Behrmann, Duvenaud & Jacobsen 2019, Residual Flows for Invertible Generative Modeling.
    """
    parts: list[FlowTransform] = []
    for _ in range(check_positive("num_layers", num_layers)):
        flow = ResidualFlow(input_dim, hidden_dims, context_dim=context_dim, **options)
        parts += [ActNorm(input_dim), flow]
    return ComposeFlow(parts)


# --- their layers ---


def _couplings(
    input_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int] | None,
    context_dim: int,
    **options: Any,
) -> list[Coupling]:
    """Couplings with the two halves in turn."""
    make = partial(Coupling, input_dim, hidden_dims, context_dim=context_dim, **options)
    return [make(flip=flip) for flip in _flips(num_layers)]


def has_constant_networks(input_dim: int, context_dim: int = 0) -> bool:
    """Whether the networks of autoregressive layers have no input: one variable without a context.

    Hidden layers then only reparameterise the biases of the last. Adam, which moves each weight by its rate, moves the
    outputs some 30 times as fast through two hidden layers of 64.
    """
    return input_dim == 1 and not context_dim


def _autoregressives(
    input_dim: int,
    num_layers: int,
    hidden_dims: Sequence[int] | None,
    context_dim: int,
    **options: Any,
) -> list[Autoregressive]:
    """Forwards and backwards in turn: the last variable in one layer, which all others feed, is the first in the next."""
    if hidden_dims is None and has_constant_networks(input_dim, context_dim):
        hidden_dims = ()
    make: Callable[..., Autoregressive] = partial(
        Autoregressive, input_dim, hidden_dims, context_dim=context_dim, **options
    )
    forwards = list(range(input_dim))
    return [make(order=forwards[::-1] if flip else forwards) for flip in _flips(num_layers)]


def _flips(num_layers: int) -> list[bool]:
    return [k % 2 == 1 for k in range(check_positive("num_layers", num_layers))]
