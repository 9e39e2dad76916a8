"""Densities of vectors, exact, by the names of their papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributions import Distribution

from ..distributions import FlowDistribution
from .recipe import exact, recorded

Base = Distribution | nn.Module | None
Widths = Sequence[int] | None


@recorded
def NSF(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Widths = None,
    base: Base = None,
    *,
    kind: str = "coupling",
    num_bins: int = 8,
    bound: float | None = None,
    linear: bool = True,
    **options: Any,
) -> FlowDistribution:
    """Neural spline flow: rational-quadratic splines with LU linear layers between them. Exact.

    The first choice for data: sharp edges and several modes; scores and draws take one network pass a layer.

    Args:
        event_shape: D or `(D,)`.
        context_dim: C of contexts `(*, C)`; `condition(context)` then returns the density at a context.
        num_layers: number of spline layers.
        hidden_dims: widths of the networks.
        base: distribution of vectors `(D)`, or a module that returns one; N(0, I) by default.
        kind: "coupling", or "autoregressive", which draws variable by variable.
        num_bins, bound: as in `transforms.RationalQuadratic`.
        linear: whether there are linear layers.
        options: as in `transforms.nsf`.

    Returns:
        A `FlowDistribution` of vectors.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> flow = pf.flows.NSF(3, context_dim=2)
        >>> flow.condition(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])

    References:
        Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows.
    """
    return exact(
        "nsf",
        event_shape,
        base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        kind=kind,
        num_bins=num_bins,
        bound=bound,
        linear=linear,
        **options,
    )


@recorded
def MAF(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 5,
    hidden_dims: Widths = None,
    base: Base = None,
    **options: Any,
) -> FlowDistribution:
    """Masked autoregressive flow: affine autoregressive layers in alternating order. Exact.

    Scores take one network pass a layer, draws go variable by variable (see `transforms.Autoregressive`).

    Args:
        event_shape, context_dim, num_layers, hidden_dims, base: as in `NSF`.
        options: as in `transforms.maf`.

    Example:
        >>> pf.flows.MAF(3).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])

    References:
        Papamakarios, Pavlakou & Murray 2017, Masked Autoregressive Flow for Density Estimation.
    """
    return exact(
        "maf",
        event_shape,
        base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        **options,
    )


@recorded
def IAF(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 2,
    hidden_dims: Widths = None,
    base: Base = None,
    **options: Any,
) -> FlowDistribution:
    """Inverse autoregressive flow: affine autoregressive layers in the orientation of guides. Exact.

    Draws and their scores take one network pass a layer; scores of other values go variable by variable. `MAF` is
    the orientation for data.

    Args:
        event_shape, context_dim, num_layers, hidden_dims, base: as in `NSF`.
        options: as in `transforms.iaf`.

    Example:
        >>> pf.flows.IAF(3).rsample((5,)).shape
        torch.Size([5, 3])

    References:
        Kingma et al. 2016, Improving Variational Inference with Inverse Autoregressive Flow.
    """
    return exact(
        "iaf",
        event_shape,
        base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        **options,
    )


@recorded
def RealNVP(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 8,
    hidden_dims: Widths = None,
    base: Base = None,
    *,
    linear: bool = False,
    **options: Any,
) -> FlowDistribution:
    """Affine couplings, the two halves in turn. Exact, one network pass a layer in both directions.

    Args:
        event_shape: D >= 2 or `(D,)`.
        context_dim, num_layers, hidden_dims, base: as in `NSF`.
        linear: whether an LU linear layer and an ActNorm follow each coupling, as in Glow.
        options: as in `transforms.realnvp`, or `transforms.glow_vector` where `linear` is true.

    Example:
        >>> pf.flows.RealNVP(3, linear=True).sample((5,)).shape
        torch.Size([5, 3])

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP; `linear`: Kingma & Dhariwal 2018, Glow.
    """
    return exact(
        "glow-vector" if linear else "realnvp",
        event_shape,
        base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        **options,
    )


@recorded
def NICE(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Widths = None,
    base: Base = None,
    **options: Any,
) -> FlowDistribution:
    """Additive couplings and one scale by coordinate. Exact, one network pass a layer in both directions.

    Args:
        event_shape: D >= 2 or `(D,)`.
        context_dim, num_layers, hidden_dims, base: as in `NSF`.
        options: as in `transforms.nice`.

    Example:
        >>> pf.flows.NICE(3).sample((5,)).shape
        torch.Size([5, 3])

    References:
        Dinh, Krueger & Bengio 2014, NICE: Non-linear Independent Components Estimation.
    """
    return exact(
        "nice",
        event_shape,
        base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        **options,
    )


@recorded
def Residual(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 8,
    hidden_dims: Widths = None,
    base: Base = None,
    **options: Any,
) -> FlowDistribution:
    """Residual flow: steps of an ActNorm and x + g(x) with g a contraction; draws solve fixed points.

    Exact in eval mode for D <= 16; `log_prob` is an unbiased estimate in training and beyond.

    Args:
        event_shape, context_dim, num_layers, hidden_dims, base: as in `NSF`.
        options: as in `transforms.ResidualFlow`.

    Example:
        >>> pf.flows.Residual(2, num_layers=2).eval().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    References:
        Chen, Behrmann, Duvenaud & Jacobsen 2019, Residual Flows for Invertible Generative Modeling.
    """
    return exact(
        "residual",
        event_shape,
        base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        **options,
    )


@recorded
def Planar(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 16,
    hidden_dims: Widths = None,
    base: Base = None,
) -> FlowDistribution:
    """Planar layers, from the data to the base: O(KD) parameters. Exact; draws find a scalar root a layer.

    Args:
        event_shape, context_dim, num_layers, base: as in `NSF`.
        hidden_dims: widths of the network that reads the context; None without one.

    Example:
        >>> pf.flows.Planar(3).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])

    References:
        Rezende & Mohamed 2015, Variational Inference with Normalizing Flows.
    """
    return exact(
        "planar", event_shape, base, num_layers, context_dim=context_dim, hidden_dims=hidden_dims
    )


@recorded
def Radial(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 16,
    hidden_dims: Widths = None,
    base: Base = None,
) -> FlowDistribution:
    """Radial layers: each widens or narrows the density around a point. Exact, closed form in both directions.

    Args:
        event_shape, context_dim, num_layers, base: as in `NSF`.
        hidden_dims: widths of the network that reads the context; None without one.

    Example:
        >>> pf.flows.Radial(3).sample((5,)).shape
        torch.Size([5, 3])

    References:
        Rezende & Mohamed 2015, Variational Inference with Normalizing Flows.
    """
    return exact(
        "radial", event_shape, base, num_layers, context_dim=context_dim, hidden_dims=hidden_dims
    )


@recorded
def Sylvester(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int = 8,
    hidden_dims: Widths = None,
    base: Base = None,
    *,
    kind: str = "orthogonal",
    rank: int | None = None,
    **options: Any,
) -> FlowDistribution:
    """Sylvester layers, from the data to the base: O(KD²) parameters. Exact; draws find `rank` roots a layer.

    Args:
        event_shape, context_dim, num_layers, base: as in `NSF`.
        hidden_dims: widths of the network that reads the context; None without one.
        kind: "orthogonal", "householder" or "triangular".
        rank: M <= D; D by default.
        options: as in `transforms.sylvester`.

    Example:
        >>> pf.flows.Sylvester(3, rank=2).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])

    References:
        van den Berg, Hasenclever, Tomczak & Welling 2018, Sylvester Normalizing Flows for Variational Inference.
    """
    return exact(
        "sylvester",
        event_shape,
        base,
        num_layers,
        context_dim=context_dim,
        hidden_dims=hidden_dims,
        kind=kind,
        rank=rank,
        **options,
    )
