"""The helpers that Pyro has under the same names in `pyro.distributions.transforms`.

Each makes one transform of this package: the dimension comes first, in the conditional ones the size of the context second.
`pyro.distributions.transforms.iterated` takes any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import Unpack

from ..ops import check_positive
from .autoregressive import Autoregressive, MADEOptions
from .coupling import Coupling, CouplingOptions
from .normalization import BatchNorm
from .permute import Permute
from .planar import Planar
from .radial import Radial
from .transformers import RationalQuadratic

Widths = Sequence[int] | None


def planar(input_dim: int, *, num_layers: int = 1) -> Planar:
    """A planar flow: see `Planar`."""
    return Planar(input_dim, num_layers=num_layers)


def conditional_planar(
    input_dim: int, context_dim: int, hidden_dims: Widths = None, *, num_layers: int = 1
) -> Planar:
    """A planar flow at a context: see `Planar`."""
    return Planar(
        input_dim,
        num_layers=num_layers,
        context_dim=check_positive("context_dim", context_dim),
        hidden_dims=hidden_dims,
    )


def radial(input_dim: int, *, num_layers: int = 1) -> Radial:
    """A radial flow: see `Radial`."""
    return Radial(input_dim, num_layers=num_layers)


def conditional_radial(
    input_dim: int, context_dim: int, hidden_dims: Widths = None, *, num_layers: int = 1
) -> Radial:
    """A radial flow at a context: see `Radial`."""
    return Radial(
        input_dim,
        num_layers=num_layers,
        context_dim=check_positive("context_dim", context_dim),
        hidden_dims=hidden_dims,
    )


def affine_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Widths = None,
    *,
    context_dim: int = 0,
    **options: Unpack[CouplingOptions],
) -> Coupling:
    """An affine coupling layer: see `Coupling`."""
    return Coupling(input_dim, hidden_dims, context_dim=context_dim, **options)


def conditional_affine_coupling(
    input_dim: int | Sequence[int],
    context_dim: int,
    hidden_dims: Widths = None,
    **options: Unpack[CouplingOptions],
) -> Coupling:
    """An affine coupling layer at a context: see `Coupling`."""
    context_dim = check_positive("context_dim", context_dim)
    return Coupling(input_dim, hidden_dims, context_dim=context_dim, **options)


def spline_coupling(
    input_dim: int | Sequence[int],
    hidden_dims: Widths = None,
    *,
    num_bins: int = 8,
    bound: float = 5.0,
    context_dim: int = 0,
    **options: Unpack[CouplingOptions],
) -> Coupling:
    """A rational-quadratic coupling layer: see `Coupling` and `RationalQuadratic`."""
    spline = RationalQuadratic(num_bins, bound)
    return Coupling(input_dim, hidden_dims, transformer=spline, context_dim=context_dim, **options)


def affine_autoregressive(
    input_dim: int,
    hidden_dims: Widths = None,
    *,
    context_dim: int = 0,
    **options: Unpack[MADEOptions],
) -> Autoregressive:
    """An affine autoregressive flow, fast forward (IAF); `.inv` is fast backward (MAF): see `Autoregressive`."""
    return Autoregressive(input_dim, hidden_dims, context_dim=context_dim, **options)


def conditional_affine_autoregressive(
    input_dim: int, context_dim: int, hidden_dims: Widths = None, **options: Unpack[MADEOptions]
) -> Autoregressive:
    """An affine autoregressive flow at a context: see `Autoregressive`."""
    context_dim = check_positive("context_dim", context_dim)
    return Autoregressive(input_dim, hidden_dims, context_dim=context_dim, **options)


def spline_autoregressive(
    input_dim: int,
    hidden_dims: Widths = None,
    *,
    num_bins: int = 8,
    bound: float = 3.0,
    context_dim: int = 0,
    **options: Unpack[MADEOptions],
) -> Autoregressive:
    """An autoregressive flow of splines, fast forward: see `Autoregressive` and `RationalQuadratic`."""
    spline = RationalQuadratic(num_bins, bound)
    return Autoregressive(
        input_dim, hidden_dims, transformer=spline, context_dim=context_dim, **options
    )


def conditional_spline_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Widths = None,
    *,
    num_bins: int = 8,
    bound: float = 3.0,
    **options: Unpack[MADEOptions],
) -> Autoregressive:
    """An autoregressive flow of splines at a context: see `Autoregressive` and `RationalQuadratic`."""
    context_dim = check_positive("context_dim", context_dim)
    return spline_autoregressive(
        input_dim, hidden_dims, num_bins=num_bins, bound=bound, context_dim=context_dim, **options
    )


def batchnorm(input_dim: int, *, momentum: float = 0.1, eps: float = 1e-5) -> BatchNorm:
    """Batch normalisation in the inverse pass: see `BatchNorm`."""
    return BatchNorm(input_dim, momentum=momentum, eps=eps)


def permute(
    input_dim: int, *, kind: str = "reverse", generator: torch.Generator | None = None
) -> Permute:
    """A permutation of the coordinates, `kind` "reverse", or "random" and drawn from `generator`: see `Permute`."""
    check_positive("input_dim", input_dim)
    if kind == "reverse":
        return Permute(range(input_dim)[::-1])
    if kind == "random":
        return Permute(torch.randperm(input_dim, generator=generator))
    raise ValueError(f"kind: expected one of reverse, random; got {kind!r}")
