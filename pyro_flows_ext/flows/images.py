"""Multi-scale densities of images `(C, H, W)`, by the names of their papers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..distributions import MultiScaleFlow
from ..ops import check_context_dim, check_positive
from ..transforms import (
    ActNorm,
    ComposeFlow,
    Coupling,
    FlowTransform,
    Invertible1x1Conv,
    Pixelwise,
    RationalQuadratic,
    ResidualFlow,
    Squeeze,
)
from .recipe import recorded

Shape = tuple[int, int, int]


@recorded
def Glow(
    event_shape: Sequence[int],
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    num_levels: int = 2,
    factor_out: str | Sequence[Tensor] = "channel",
) -> MultiScaleFlow:
    """Glow: steps of ActNorm, 1x1 convolution and affine coupling by channel, after a squeeze. Exact.

    `density.initialize(images)` sets the ActNorms; `fit_density` does so for a density that is new.

    Args:
        event_shape: `(C, H, W)`, with H and W divisible by 2 to the power of `num_levels`.
        context_dim: number of context variables that the networks read.
        num_layers: steps a level.
        hidden_dims: channels of the residual blocks of each network, all equal.
        num_levels: number of levels, between which half of the elements become latents.
        factor_out: which elements these are: see `transforms.MultiScale`.

    Returns:
        A `MultiScaleFlow` over a standard normal base.

    Raises:
        ValueError: for arguments out of range, and sizes that do not fit the levels.

    Example:
        >>> pf.flows.Glow((1, 8, 8), num_layers=2).sample((5,)).shape
        torch.Size([5, 1, 8, 8])

    References:
        Kingma & Dhariwal 2018, Glow, with 3 levels of 32 steps and networks of 512 channels for CIFAR-10.
    """
    options = _options(event_shape, num_layers, hidden_dims, context_dim)
    level = partial(_steps, **options)
    return MultiScaleFlow(event_shape, level, num_levels, factor_out, squeeze_first=True)


@recorded
def RealNVPImage(
    event_shape: Sequence[int],
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    num_levels: int = 2,
    factor_out: str | Sequence[Tensor] = "channel",
) -> MultiScaleFlow:
    """RealNVP of images: affine couplings by checkerboards in turn, an ActNorm behind each. Exact.

    Args:
        event_shape, context_dim, hidden_dims, num_levels, factor_out: as in `Glow`.
        num_layers: couplings a level.

    Example:
        >>> pf.flows.RealNVPImage((1, 4, 4), num_layers=2).sample((5,)).shape
        torch.Size([5, 1, 4, 4])

    References:
        Dinh, Sohl-Dickstein & Bengio 2017, Density estimation using Real NVP, with three couplings by checkerboard
        and three by channel, batch normalisation, and networks of 4 to 8 blocks of 32 to 64 channels.
    """
    options = _options(event_shape, num_layers, hidden_dims, context_dim)
    level = partial(_couplings, **options)
    return MultiScaleFlow(event_shape, level, num_levels, factor_out)


@recorded
def NSFImage(
    event_shape: Sequence[int],
    context_dim: int = 0,
    num_layers: int = 4,
    hidden_dims: Sequence[int] = (32, 32),
    *,
    num_levels: int = 2,
    num_bins: int = 4,
    bound: float = 3.0,
    factor_out: str | Sequence[Tensor] = "channel",
) -> MultiScaleFlow:
    """RQ-NSF (C) of images: as `Glow`, with rational-quadratic splines in the couplings. Exact.

    Args:
        event_shape, context_dim, num_layers, hidden_dims, num_levels, factor_out: as in `Glow`.
        num_bins, bound: as in `transforms.RationalQuadratic`.

    Example:
        >>> pf.flows.NSFImage((1, 4, 4), num_layers=1).sample((5,)).shape
        torch.Size([5, 1, 4, 4])

    References:
        Durkan, Bekasov, Murray & Papamakarios 2019, Neural Spline Flows, with 3 levels of 7 steps, 3 blocks of 96 to
        128 channels and 4 to 8 bins.
    """
    options = _options(event_shape, num_layers, hidden_dims, context_dim)
    level = partial(_steps, transformer=RationalQuadratic(num_bins, bound), **options)
    return MultiScaleFlow(event_shape, level, num_levels, factor_out, squeeze_first=True)


def _options(
    event_shape: Any, num_layers: int, hidden_dims: Sequence[int], context_dim: int
) -> dict[str, Any]:
    """The options of a level."""
    if not isinstance(event_shape, Sequence) or len(event_shape) != 3:
        raise ValueError(
            f"event_shape: expected (C, H, W), got {event_shape!r}; NSF, RealNVP and others are densities of vectors"
        )
    return {
        "num_layers": check_positive("num_layers", num_layers),
        "hidden_dims": tuple(hidden_dims),
        "context_dim": check_context_dim(context_dim),
    }


def image_layers(
    event_shape: Sequence[int],
    flow: str,
    num_layers: int | None,
    hidden_dims: Sequence[int] | None,
    context_dim: int,
    **options: Any,
) -> list[FlowTransform]:
    """Layers of images of a flow by name, one by one, from the base to the data; "glow" and "residual" start at half the size."""
    if flow not in ("glow", "realnvp", "residual"):
        raise ValueError(f"flow: expected glow, realnvp or residual for images, got {flow!r}")
    C, H, W = event_shape
    squeezed = flow != "realnvp"
    shape = tuple(Squeeze().forward_shape((C, H, W))) if squeezed else (C, H, W)
    depth = _options(event_shape, num_layers or 4, (), context_dim)["num_layers"]
    layers: list[FlowTransform] = []
    for i in range(depth):
        if flow == "residual":
            residual = ResidualFlow(shape, hidden_dims, context_dim=context_dim, **options)
            layers.append(ComposeFlow([residual.inv, Pixelwise(ActNorm(shape[0]))]))
            continue
        widths = (32, 32) if hidden_dims is None else tuple(hidden_dims)
        if flow == "glow":
            parts = _steps(shape, 1, hidden_dims=widths, context_dim=context_dim, **options)  # type: ignore[arg-type]
        else:
            parts = _couplings(shape, 1, hidden_dims=widths, context_dim=context_dim, flip=i % 2 == 1, **options)  # type: ignore[arg-type]  # fmt: skip
        layers.append(parts)
    if squeezed:
        layers[-1] = ComposeFlow([layers[-1], Squeeze().inv])
    return layers


def _couplings(shape: Shape, num_layers: int, flip: bool = False, **options: Any) -> FlowTransform:
    """Affine couplings with checkerboards in turn."""
    parts: list[FlowTransform] = []
    for i in range(num_layers):
        parts.append(Coupling(shape, mask="checkerboard", flip=(i % 2 == 1) != flip, **options))
        parts.append(Pixelwise(ActNorm(shape[0])))
    return ComposeFlow(parts)


def _steps(shape: Shape, num_layers: int, **options: Any) -> FlowTransform:
    """Glow's steps."""
    parts: list[FlowTransform] = []
    for _ in range(num_layers):
        parts.append(Coupling(shape, mask="channel", **options))
        parts.append(Invertible1x1Conv(shape[0]))
        parts.append(Pixelwise(ActNorm(shape[0])))
    return ComposeFlow(parts)
