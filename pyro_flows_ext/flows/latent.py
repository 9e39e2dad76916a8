"""Densities of vectors with latent indices, ordered latents or a learned low-dimensional base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import Distribution

from ..distributions import ContinuouslyIndexedFlow, FlowVAE, NestedDropoutFlow
from ..ops import check_context_dim, check_positive
from ..transforms import LULinear, QRLinear
from ..transforms.by_name import PRESETS
from .images import image_layers
from .recipe import base_of, read_size, recorded

LINEAR: dict[str, Any] = {"qr": QRLinear, "lu": LULinear}


@recorded
def CIF(
    event_shape: int | Sequence[int],
    context_dim: int = 0,
    num_layers: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    base: Distribution | nn.Module | None = None,
    *,
    flow: str | None = None,
    index_dim: int = 1,
    **options: Any,
) -> ContinuouslyIndexedFlow:
    """Lower bound: a continuously indexed flow, whose layers differ by latent indices.

    For data with holes, edges and separate parts, which no continuous map of a Gaussian has. Draws are exact.

    Args:
        event_shape, base: as in `NSF`; or `(C, H, W)` for images, over a standard normal.
        context_dim: number of context variables that all networks see; takes a flow that reads them.
        num_layers: number of layers of the flow; its own default for None.
        hidden_dims: widths of the networks of the flow.
        flow: a name in `transforms.by_name.PRESETS`, by default "maf"; for images "glow", "realnvp" or "residual", the
            default.
        index_dim: the length of each index; for images its number of channels.
        options: of the flow.

    Returns:
        A `ContinuouslyIndexedFlow`: `log_prob` is one draw of the bound, `log_prob_bound` takes many.

    Raises:
        ValueError: for an unknown flow and arguments out of range.

    Example:
        >>> pf.flows.CIF(2, num_layers=2).log_prob_bound(torch.zeros(5, 2), 10).shape
        torch.Size([5])

    References:
        Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
        Normalising Flows.
    """
    if isinstance(event_shape, Sequence) and len(event_shape) == 3:
        if base is not None:
            raise ValueError("base: expected none for images, whose base is standard normal")
        parts = image_layers(
            event_shape, flow or "residual", num_layers, hidden_dims, context_dim, **options
        )
        shape = torch.Size(event_shape)
        for part in reversed(parts):
            shape = part.inverse_shape(shape)
        noise = dist.Normal(torch.zeros(shape), 1.0).to_event(3)
        return ContinuouslyIndexedFlow(
            noise, parts, index_dim, (8,), (16,), context_dim=context_dim
        )
    size = read_size(event_shape)
    if context_dim:
        options["context_dim"] = check_context_dim(context_dim)
    transform = _preset(flow or "maf", size, num_layers, hidden_dims, **options)
    return ContinuouslyIndexedFlow(
        base_of(size, base),
        transform,
        index_dim,
        context_dim=context_dim,
    )


@recorded
def NestedDropout(
    event_shape: int | Sequence[int],
    num_layers: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    base: Distribution | nn.Module | None = None,
    *,
    flow: str = "qr",
    index_prob: float = 0.33,
    reconstruction_weight: float = 20.0,
    **options: Any,
) -> NestedDropoutFlow:
    """An exact density whose latents are ordered: the first few reconstruct the data.

    Args:
        event_shape, base: as in `NSF`.
        num_layers, hidden_dims: of the flow; None for "qr" and "lu".
        flow: "qr" or "lu", one linear layer, or a name in `transforms.by_name.PRESETS`.
        index_prob, reconstruction_weight: as in `NestedDropoutFlow`.
        options: of the flow.

    Example:
        >>> flow = pf.flows.NestedDropout(4)
        >>> flow.reconstruct(torch.zeros(5, 4), 2).shape
        torch.Size([5, 4])

    References:
        Bekasov & Murray 2020, Ordering Dimensions with Nested Dropout Normalizing Flows.
    """
    size = read_size(event_shape)
    if flow in LINEAR:
        if num_layers not in (None, 1) or hidden_dims is not None:
            raise ValueError(
                f"num_layers, hidden_dims: expected none for flow={flow!r}, which is one linear layer, got "
                f"{num_layers!r} and {hidden_dims!r}"
            )
        transform: Any = LINEAR[flow](size, **options)
    else:
        transform = _preset(flow, size, num_layers, hidden_dims, **options)
    return NestedDropoutFlow(
        base_of(size, base),
        transform,
        index_prob=index_prob,
        reconstruction_weight=reconstruction_weight,
    )


@recorded
def VAE(
    event_shape: int | Sequence[int],
    num_layers: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    *,
    flow: str = "nsf",
    latent_dim: int | None = None,
    **options: Any,
) -> FlowVAE:
    """Lower bound: an exact flow whose base is a small variational autoencoder of `latent_dim` numbers.

    Args:
        event_shape: D or `(D,)`.
        num_layers, hidden_dims: of the flow.
        flow: a name in `transforms.by_name.PRESETS`.
        latent_dim: dimension of the noise; half of D and at most 8 by default.
        options: of the flow.

    Example:
        >>> pf.flows.VAE(6).encode(torch.zeros(5, 6)).shape
        torch.Size([5, 3])

    References:
        Das, Abbeel & Spanos 2019, Dimensionality Reduction Flows, section 3.1.
    """
    size = read_size(event_shape)
    transform = _preset(flow, size, num_layers, hidden_dims, **options)
    return FlowVAE(transform, size, max(1, min(8, size // 2)) if latent_dim is None else latent_dim)


def _preset(
    flow: str, size: int, num_layers: int | None, hidden_dims: Sequence[int] | None, **options: Any
) -> Any:
    """The transform of a preset, in the orientation that scores data in one pass."""
    if flow not in PRESETS:
        raise ValueError(f"flow: expected one of {', '.join(PRESETS)}; got {flow!r}")
    preset = PRESETS[flow]
    depth = preset.num_layers if num_layers is None else check_positive("num_layers", num_layers)
    transform = preset.make(size, num_layers=depth, hidden_dims=hidden_dims, **options)
    return transform.inv if preset.is_pushing else transform
