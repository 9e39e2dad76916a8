"""Latents and the indices of a continuously indexed flow together: a flow of noise, with a reverse model beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.indexed_layer import IndexedLayer
from ..transforms import FlowTransform
from ._augmented import AugmentedFlow


class IndexedFlow(AugmentedFlow):
    """(z_0, ε_1, ..., ε_K) -> (z, u_1, ..., u_K), z = placement(z_K): latents with their indices as a flow of noise.

    Of vectors `(*, D + K · index_dim)`; log|det| exact. A pass gives log r(u | z) too, which is remembered with it.
    With layers that take a context, `condition(context)` conditions layers and placement.
    Cost: one pass of every layer, in both directions.
    """

    placement: Any

    def __init__(self, layers: Sequence[IndexedLayer], placement: FlowTransform):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.placement = placement
        self.latent_dim, self.index_dim = layers[0].input_dim, layers[0].index_dim
        self.context_dim = layers[0].context_dim
        self.input_dim = self.latent_dim + len(layers) * self.index_dim

    def condition(self, context: Tensor) -> FlowTransform:
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
            z, u, terms = layer.push(z, eps, context)  # type: ignore[operator]
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
            z, eps, terms = self.layers[k].pull(z, u, context)  # type: ignore[operator]
            noise.append(eps)
            sums.append(terms)
        return torch.cat([z, *reversed(noise)], -1), torch.stack(sums).sum(0)

    def _indices(self, rest: Tensor) -> Sequence[Tensor]:
        """By layer, `(*, index_dim)`."""
        return rest.unflatten(-1, (-1, self.index_dim)).unbind(-2)

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, num_layers={len(self.layers)}, index_dim={self.index_dim}"
