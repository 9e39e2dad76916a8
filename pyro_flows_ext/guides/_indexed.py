"""Latents and the indices of a continuously indexed flow together: a flow of noise, with a reverse model beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..nn import MLP
from ..transforms import ComposeFlow, FlowTransform, IndexedTransform
from ..transforms._constrain import bounded_affine, check_event


class IndexedFlow(FlowTransform):
    """(z_0, ε_1, ..., ε_K) -> (z, u_1, ..., u_K), z = placement(z_K): latents with their indices as a flow of noise.

    Of vectors `(*, D + K · index_dim)`; log|det| exact. A pass gives log r(u | z) too, which is remembered with it.
    Cost: one pass of every layer, in both directions.
    """

    def __init__(self, layers: Sequence[IndexedLayer], placement: ComposeFlow):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.placement = placement
        self.latent_dim, self.index_dim = layers[0].input_dim, layers[0].index_dim
        self.input_dim = self.latent_dim + len(layers) * self.index_dim

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (ladj, _) = self._push(x)
        return y, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, (ladj, _) = self.pull(*self._split("y", y))
        return x, ladj

    def _push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y `(*, D + K · index_dim)`; log|det| and log r, `(2, *)`."""
        z, noise = self._split("x", x)
        indices, sums = [], []
        for layer, eps in zip(self.layers, noise, strict=True):
            z, u, terms = layer.push(z, eps)  # type: ignore[operator]
            indices.append(u)
            sums.append(terms)
        z, ladj = self.placement.forward_and_ladj(z)
        sums.append(torch.stack([ladj, torch.zeros_like(ladj)]))
        return torch.cat([z, *indices], -1), torch.stack(sums).sum(0)

    def pull(self, z: Tensor, indices: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The noise x that gives z `(*, D)` with these indices; log|det| of the inverse and log r, `(2, *)`.

        Indices are drawn from r where None.
        """
        z, ladj = self.placement.inverse_and_ladj(z)
        sums, noise = [torch.stack([ladj, torch.zeros_like(ladj)])], []
        for k in reversed(range(len(self.layers))):
            u = None if indices is None else indices[k]
            z, eps, terms = self.layers[k].pull(z, u)  # type: ignore[operator]
            noise.append(eps)
            sums.append(terms)
        return torch.cat([z, *reversed(noise)], -1), torch.stack(sums).sum(0)

    def log_reverse(self, y: Tensor) -> Tensor:
        """log r(u_1, ..., u_K | z) of y = (z, u_1, ..., u_K): `(*)`, free where y comes from the last pass."""
        if (hit := self._lookup(y=y)) is not None:
            return hit[2][1]
        return self.pull(*self._split("y", y))[1][1]

    def _split(self, name: str, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        check_event(name, x, self.input_dim)
        z, rest = x[..., : self.latent_dim], x[..., self.latent_dim :]
        return z, rest.unflatten(-1, (-1, self.index_dim)).unbind(-2)

    # The cache holds log|det| and log r of a pass as one tensor.

    def __call__(self, x: Tensor) -> Tensor:
        if (hit := self._lookup(x=x)) is not None:
            return hit[1]
        y, terms = self._push(x)
        self._store(x, y, terms, is_forward=True)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        if (hit := self._lookup(y=y)) is not None:
            return hit[0]
        x, (ladj, log_r) = self.pull(*self._split("y", y))
        self._store(y, x, torch.stack([-ladj, log_r]), is_forward=False)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if (hit := self._lookup(x=x, y=y)) is not None:
            return hit[2][0]
        return self.forward_and_ladj(x)[1]

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, num_layers={len(self.layers)}, index_dim={self.index_dim}"


class IndexedLayer(nn.Module):
    """(z, ε) -> (F(z; u), u) with u = μ(z) + σ(z) ⊙ ε, and log r(u | a) for a = f⁻¹(F(z; u)) = exp(s(u)) ⊙ z + t(u).

    q(u | z) = N(u; μ, σ²) and r, normal too, are N(0, I) at first, whatever z and a. See `IndexedTransform` for F.
    """

    def __init__(
        self,
        transform: FlowTransform,
        input_dim: int,
        index_dim: int = 1,
        hidden_dims: Sequence[int] = (10, 10),
    ):
        super().__init__()
        self.input_dim, self.index_dim = input_dim, index_dim
        self.indexed = IndexedTransform(transform, index_dim, hidden_dims, input_dim=input_dim)
        self.index_net = MLP(input_dim, 2 * index_dim, hidden_dims, zero_last=True)
        self.reverse_net = MLP(input_dim, 2 * index_dim, hidden_dims, zero_last=True)

    def push(self, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """F(z; u), u, and log|det| of the map from (z, ε) and log r, `(2, *)`."""
        u, log_scale = _affine(noise, self.index_net(z), inverse=False)
        affine, f = self.indexed.condition(u)
        a, ladj = affine.forward_and_ladj(z)
        value, inner = f.forward_and_ladj(a)
        log_r = _log_normal(u, self.reverse_net(a))
        return value, u, torch.stack([log_scale.sum(-1) + ladj + inner, log_r])

    def pull(self, value: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """z, ε, and log|det| of the inverse map and log r, `(2, *)`; u is drawn from r where None."""
        a, inner = self.indexed.transform.inverse_and_ladj(value)  # type: ignore[union-attr, operator]
        reverse = self.reverse_net(a)
        if u is None:
            u, _ = _affine(torch.randn_like(reverse[..., : self.index_dim]), reverse, inverse=False)
        affine, _ = self.indexed.condition(u)
        z, ladj = affine.inverse_and_ladj(a)
        noise, log_scale = _affine(u, self.index_net(z), inverse=True)
        return z, noise, torch.stack([log_scale.sum(-1) + ladj + inner, _log_normal(u, reverse)])


def _affine(x: Tensor, params: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """loc + scale ⊙ x or its inverse, and the log-derivatives, for `params` `(*, 2 · index_dim)` from a network."""
    return bounded_affine(x, *params.chunk(2, -1), inverse=inverse)


def _log_normal(u: Tensor, params: Tensor) -> Tensor:
    """log N(u; loc, scale²), `(*)`."""
    noise, log_slope = _affine(u, params, inverse=True)
    return (log_slope - 0.5 * (noise.square() + math.log(2 * math.pi))).sum(-1)
