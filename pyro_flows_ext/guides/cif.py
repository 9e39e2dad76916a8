"""`AutoCIF`: a continuously indexed flow over all latent variables, with a density of latents and indices together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from ..distributions.indexed_layer import IndexedLayer
from ..ops import check_positive
from ..transforms import ComposeFlow, FlowTransform, Whitening, iaf, maf, nsf, realnvp
from ..transforms.presets import has_constant_networks
from ._augmented import AugmentedFlow, AugmentedGuide
from .base import GuideOptions
from .flows import FlowFactory
from .tails import layers_behind


def _nsf_ar(input_dim: int, **options: Any) -> list[FlowTransform]:
    # The orientation that draws in one pass; the preset, for data, scores in one.
    return [step.inv for step in nsf(input_dim, kind="autoregressive", linear=False, **options)]


# The presets of `AutoCIF(model, transform="name")`; every layer takes one step of a preset.
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
    constrain(loc + L (m + s ⊙ t(z_K))) as in `AutoFlow`. A map for every u has modes, edges and holes that no single map of
    a Gaussian has. But log q(z) = log ∫ q(z, u) du is intractable: the guide has the density of (z, u), and trains a reverse
    model r(u | z):

        ELBO = E_q(z,u) [log p(x, z) + log r(u | z) - log q(z, u)]  <=  log p(x),

    with equality if q(z) is the posterior and r(u | z) is q(u | z). Every Pyro ELBO is this bound, or its form with many
    particles (`ReweightedWakeSleep` gives r no gradient). Importance weights p(x, z) r(u | z) / q(z, u) are right, with more
    variance than those of q(z). q_l and r_l are diagonal normals, with location and scale from networks; r_l takes
    f_l⁻¹(z_l), in which u_l is a shift and a scale. Affine steps ("realnvp", "iaf", "maf") are poor at several modes.

    Training draws: one pass a layer, except with "maf", where drawing takes sweeps. `log_prob_bound` and path gradients
    invert: one pass a layer, except with "nsf-ar" and "iaf", where inverting takes sweeps.

    Args:
        model: a Pyro model with continuous latents.
        num_layers: K.
        transform: a name in `STEPS`, for a preset with one step a layer; or a callable from D to a `FlowTransform`,
            called once a layer.
        index_dim: length of u_l.
        hidden_dims: widths of the preset's networks.
        index_hidden_dims: widths of the networks of s, t, q_l and r_l.
        base_scale: σ₀, in the coordinates of `whiten`; above 1 for posteriors with modes far apart.
        options: `init_loc_fn` and `init_scale`: see `AutoFlow`.

    Raises:
        TypeError, ValueError: as in `AutoFlow`.

    References:
        Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
        Normalising Flows; as a guide, Caterini, Cornish, Sejdinovic & Doucet 2021, Variational Inference with
        Continuously-Indexed Normalizing Flows.
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
                "hidden_dims: expected None with a callable transform, got widths of a preset's networks; give one of the two"
            )
        if not (isinstance(transform, str) or callable(transform)):
            raise TypeError(
                "transform: expected a name or a callable from the latent dimension to a FlowTransform, "
                f"got {transform!r}"
            )
        layers = partial(
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
        placement = ComposeFlow(layers_behind(loc, self._init_scale))
        return IndexedFlow(self._flow_factory(self.latent_dim), placement)

    @property
    def whitening(self) -> Whitening:
        return self._flow.placement[-1]

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
        if hidden_dims is None and has_constant_networks(input_dim):
            # Without hidden layers, an indexed flow reached separate modes in too few of its steps.
            hidden_dims = (64, 64)
        steps = STEPS[transform](input_dim, num_layers=num_layers, hidden_dims=hidden_dims)
    else:
        steps = [transform(input_dim) for _ in range(num_layers)]
    return [IndexedLayer(f, input_dim, index_dim, index_hidden_dims) for f in steps]


class IndexedFlow(AugmentedFlow):
    """(z_0, ε_1, ..., ε_K) -> (z, u_1, ..., u_K), z = placement(z_K): latents with their indices as a flow of noise.

    Vectors are `(*, D + K · index_dim)`; log|det| is exact. With layers that take a context, `condition(context)`
    conditions layers and placement. Cost: one pass of every layer, in both directions.
    """

    layers: Any
    placement: Any

    def __init__(self, layers: Sequence[IndexedLayer], placement: FlowTransform):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.placement = placement
        self.latent_dim, self.index_dim = layers[0].input_dim, layers[0].index_dim
        self.context_dim = layers[0].context_dim
        self.input_dim = self.latent_dim + len(layers) * self.index_dim

    def condition(self, context: Tensor) -> Self:
        """Returns this flow with all layers and the placement at a context `(*, context_dim)`."""
        view = super().condition(context)
        placement = self.placement.condition(context)
        view.__dict__["_modules"] = {**self._modules, "placement": placement}
        return view

    def _push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        context = self.context
        z, rest = self._split("x", x)
        indices, sums = [], []
        for layer, eps in zip(self.layers, self._indices(rest), strict=True):
            z, u, terms = layer.push(z, eps, context)
            indices.append(u)
            sums.append(terms)
        z, ladj = self.placement.forward_and_ladj(z)
        sums.append(torch.stack([ladj, torch.zeros_like(ladj)]))
        return torch.cat([z, *indices], -1), torch.stack(sums).sum(0)

    def _pull(self, z: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        context = self.context
        indices = None if rest is None else self._indices(rest)
        z, ladj = self.placement.inverse_and_ladj(z)
        sums, noise = [torch.stack([ladj, torch.zeros_like(ladj)])], []
        for k in reversed(range(len(self.layers))):
            u = None if indices is None else indices[k]
            z, eps, terms = self.layers[k].pull(z, u, context)
            noise.append(eps)
            sums.append(terms)
        return torch.cat([z, *reversed(noise)], -1), torch.stack(sums).sum(0)

    def _indices(self, rest: Tensor) -> Sequence[Tensor]:
        """By layer, `(*, index_dim)`."""
        return rest.unflatten(-1, (-1, self.index_dim)).unbind(-2)

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, num_layers={len(self.layers)}, index_dim={self.index_dim}"
