"""One layer of a continuously indexed flow: the indexed map, the density of its index, and a reverse model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MLP
from ..transforms import FlowTransform, IndexedTransform
from .normal import affine_by, draw_by, log_normal_by

# u itself, or a function that draws it given the output of the reverse network; None draws from r.
Index = Tensor | Callable[[Tensor], Tensor] | None


class IndexedLayer(nn.Module):
    """(z, ε) -> (F(z; u), u) with u = μ(z) + σ(z) ⊙ ε, and log r(u | a) for a = f⁻¹(F(z; u)) = exp(s(u)) ⊙ z + t(u).

    p(u | z) = N(u; μ, σ²) and r(u | a) are normal, and start as one function, with s and t at zero: the layer is f at
    first, and log p = log r. See `IndexedTransform` for F.

    Args:
        transform: f.
        input_dim: D.
        index_dim: length of u.
        hidden_dims: widths of the network of s and t.
        index_hidden_dims: widths of those of p and r; `hidden_dims` by default.
        context_dim: length of a context for all networks, and for f if it takes one.
        informative: start p as a function of z. By default it is N(0, I) for every z, a saddle: s and t gain nothing
            from a u that is noise, nor p and r from a dependence on z, so that the index may stay unused.
    """

    def __init__(
        self,
        transform: FlowTransform,
        input_dim: int,
        index_dim: int = 1,
        hidden_dims: Sequence[int] = (10, 10),
        index_hidden_dims: Sequence[int] | None = None,
        context_dim: int = 0,
        *,
        informative: bool = False,
    ):
        super().__init__()
        self.input_dim, self.index_dim, self.context_dim = input_dim, index_dim, context_dim
        self.indexed = IndexedTransform(
            transform, index_dim, hidden_dims, input_dim=input_dim, context_dim=context_dim
        )
        wide = hidden_dims if index_hidden_dims is None else index_hidden_dims

        def network() -> MLP:
            return MLP(input_dim, 2 * index_dim, wide, context_dim=context_dim, zero_last=True)

        self.index_net, self.reverse_net = network(), network()
        if informative:
            correlate_with_input(self.index_net, index_dim)
            self.reverse_net.load_state_dict(self.index_net.state_dict())

    def push(
        self, z: Tensor, noise: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """F(z; u), u, and log|det| of the map from (z, ε) and log r, `(2, *)`."""
        u, log_scale = affine_by(noise, self.index_net(z, context), inverse=False)
        affine, f = self.indexed.condition(u, context)
        a, ladj = affine.forward_and_ladj(z)
        value, inner = f.forward_and_ladj(a)
        log_r = log_normal_by(u, self.reverse_net(a, context))
        return value, u, torch.stack([log_scale.sum(-1) + ladj + inner, log_r])

    def pull(
        self, value: Tensor, u: Index = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z, ε, and log|det| of the inverse map and log r, `(2, *)`."""
        f: Any = self.indexed.transform
        if context is not None:
            f = f.condition(context)
        a, inner = f.inverse_and_ladj(value)
        reverse = self.reverse_net(a, context)
        if not isinstance(u, Tensor):
            u = draw_by(reverse) if u is None else u(reverse)
        affine, _ = self.indexed.condition(u, context)
        z, ladj = affine.inverse_and_ladj(a)
        noise, log_scale = affine_by(u, self.index_net(z, context), inverse=True)
        return z, noise, torch.stack([log_scale.sum(-1) + ladj + inner, log_normal_by(u, reverse)])


@torch.no_grad()
def correlate_with_input(net: MLP, index_dim: int) -> None:
    """Initialises a network of z so that the location of u has an sd of about 1 over z, and its scale is 1/e.

    Xavier's initialisation for tanh keeps this sd for any number of layers.
    """
    *hidden, last = (layer for layer in net if isinstance(layer, nn.Linear))
    for layer in hidden:
        nn.init.xavier_normal_(layer.weight, gain=5 / 3)
    nn.init.normal_(last.weight[:index_dim], std=1.5 / last.in_features**0.5)
    nn.init.zeros_(last.weight[index_dim:])
    nn.init.zeros_(last.bias[:index_dim])
    nn.init.constant_(last.bias[index_dim:], -1.0)
