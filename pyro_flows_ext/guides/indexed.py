"""`AutoCIF`: a continuously indexed flow over all latent variables, with a density of latents and indices together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops import check_positive
from ..transforms import ComposeFlow, FlowTransform, Whitening, iaf, maf, nsf, realnvp
from ._augmented import AugmentedGuide
from ._indexed import IndexedFlow, IndexedLayer
from .base import FlowFactory, GuideOptions


def _nsf_ar(input_dim: int, **options: Any) -> list[FlowTransform]:
    # The orientation that draws in one pass, where the preset, for data, scores in one.
    return [step.inv for step in nsf(input_dim, kind="autoregressive", linear=False, **options)]


# What `AutoCIF(model, transform="name")` stands for: presets, of which every layer takes one step.
STEPS: dict[str, Callable[..., Any]] = {
    "realnvp": realnvp,
    "nsf": partial(nsf, linear=False),
    "nsf-ar": _nsf_ar,
    "iaf": iaf,
    "maf": maf,
}


class AutoCIF(AugmentedGuide):
    """A continuously indexed flow: z_0 ~ N(0, σ₀²), u_l ~ q_l(u | z_{l-1}), z_l = F_l(z_{l-1}; u_l) for l = 1 ... K.

    F(z; u) = f(exp(s(u)) ⊙ z + t(u)) around any transform f (`transforms.IndexedTransform`), and latents =
    constrain(loc + L (m + s ⊙ z_K)) as in `AutoFlow`. A different map for every u makes modes, edges and holes that no
    one map of a Gaussian has. The price: log q(z) = log ∫ q(z, u) du is not known. The density is that of (z, u), and
    a reverse model r(u | z), trained along, takes u out again:

        ELBO = E_q(z,u) [log p(x, z) + log r(u | z) - log q(z, u)]  <=  log p(x),

    with equality where q(z) is the posterior and r(u | z) is q(u | z). In Pyro, an auxiliary site `_AutoCIF_latent`
    holds (z, u_1, ..., u_K), and a factor `_AutoCIF_r` is -log r. Every ELBO is then this bound, or its form with many
    particles, and importance weights are p(x, z) r(u | z) / q(z, u): right, if less even than those of q(z) were.
    (`ReweightedWakeSleep` gives r no gradient.)

    `transform`: a name in `STEPS`, for a preset with networks of `hidden_dims`, one step a layer; or a callable from D
    to a `FlowTransform`, called once a layer. `index_dim`: the length of u_l. q_l and r_l are diagonal normals, with
    location and scale from networks of `index_hidden_dims`, as are s and t; r_l sees f_l⁻¹(z_l), in which u_l is but a
    shift and a scale. `base_scale` is σ₀, in the coordinates of `whiten`: where the posterior has parts far from each
    other, more than 1 begins on all of them.

    Training draws, in one pass a layer, with "nsf-ar" and "iaf" too, whose inverses take sweeps: `log_prob_bound`
    inverts, and so do path gradients, for r. With "maf" it is the other way round. Affine steps ("realnvp", "iaf",
    "maf") are poor at several modes. Raises what `AutoFlow` does, and `TypeError` from `log_prob` and `get_transform`,
    which there are none of.

    Source: Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
    Normalising Flows; as a guide, Caterini, Cornish, Sejdinovic & Doucet 2021, Variational Inference with Continuously-
    Indexed Normalizing Flows.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 5,
        transform: str | FlowFactory = "nsf",
        *,
        index_dim: int = 1,
        hidden_dims: Sequence[int] | None = None,
        index_hidden_dims: Sequence[int] = (10, 10),
        base_scale: float = 1.0,
        **options: Unpack[GuideOptions],
    ):
        if not 0 < base_scale < math.inf:
            raise ValueError(f"base_scale: expected a positive number, got {base_scale!r}")
        if isinstance(transform, str) and transform not in STEPS:
            raise ValueError(f"transform: expected one of {', '.join(STEPS)}, got {transform!r}")
        if not isinstance(transform, str) and hidden_dims is not None:
            raise ValueError(
                "hidden_dims: these belong to the presets; give them, or a callable transform, not both"
            )
        if not (isinstance(transform, str) or callable(transform)):
            raise TypeError(
                "transform: expected a name or a callable from the latent dimension to a FlowTransform, "
                f"got {transform!r}"
            )
        layers: Any = partial(
            _make_layers,
            transform=transform,
            num_layers=check_positive("num_layers", num_layers),
            hidden_dims=hidden_dims,
            index_dim=check_positive("index_dim", index_dim),
            index_hidden_dims=tuple(index_hidden_dims),
        )
        super().__init__(model, layers, **options)
        self._base_scale = float(base_scale)

    def _make_transform(self, loc: Tensor) -> FlowTransform:
        layers: Any = self._flow_factory
        return IndexedFlow(layers(self.latent_dim), ComposeFlow(self._placement(loc)))

    @property
    def whitening(self) -> Whitening:
        """The fixed affine map behind the flow; `whiten` sets it."""
        return self._flow.placement[-1]  # type: ignore[return-value]

    # --- the AutoContinuous protocol ---

    def get_base_dist(self) -> dist.TorchDistribution:
        """N(0, σ₀²) on D coordinates and N(0, 1) on those of the indices."""
        scale = self.whitening.loc.new_ones(self._flow.input_dim)
        scale[: self.latent_dim] = self._base_scale
        return dist.Normal(torch.zeros_like(scale), scale).to_event(1)


def _make_layers(
    input_dim: int,
    transform: str | FlowFactory,
    num_layers: int,
    hidden_dims: Sequence[int] | None,
    index_dim: int,
    index_hidden_dims: Sequence[int],
) -> list[IndexedLayer]:
    if isinstance(transform, str):
        steps = STEPS[transform](input_dim, num_layers=num_layers, hidden_dims=hidden_dims)
    else:
        steps = [transform(input_dim) for _ in range(num_layers)]
    return [IndexedLayer(f, input_dim, index_dim, index_hidden_dims) for f in steps]
