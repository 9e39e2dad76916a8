"""One layer of a continuously indexed flow: the indexed map, the density of its index, and a reverse model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..transforms import FlowTransform, IndexedTransform
from ..transforms.indexed import make_network
from .normal import affine_by, draw_by, log_normal_by, sum_event

# u itself, or a function that draws it given the output of the reverse network; None draws from r.
Index = Tensor | Callable[[Tensor], Tensor] | None


class IndexedLayer(nn.Module):
    """(z, ε) -> (F(z; u), u) with u = μ(z) + σ(z) ⊙ ε, and log r(u | a) for a = f⁻¹(F(z; u)) = exp(s(u)) ⊙ z + t(u).

    p(u | z) = N(u; μ, σ²) and r(u | a) are normal, and start as one function, with s and t at zero: the layer is f at
    first, and log p = log r. See `IndexedTransform` for F.

    Args:
        transform: f.
        input_dim: D, or `(C, H, W)` for images, of which all networks are convolutional.
        index_dim: length of u, or its `(c, H, W)`. For z an image a vector u comes from means over the pixels.
        hidden_dims: widths of the network of s and t.
        index_hidden_dims: widths of those of p and r; `hidden_dims` by default.
        context_dim: length of a context for all networks, and for f if it takes one.
        informative: start p as a function of z. By default it is N(0, I) for every z, a saddle: s and t gain nothing
            from a u that is noise, nor p and r from a dependence on z, so that the index may stay unused.
    """

    def __init__(
        self,
        transform: FlowTransform,
        input_dim: int | Sequence[int],
        index_dim: int | Sequence[int] = 1,
        hidden_dims: Sequence[int] = (10, 10),
        index_hidden_dims: Sequence[int] | None = None,
        context_dim: int = 0,
        *,
        informative: bool = False,
    ):
        super().__init__()
        shape = (input_dim,) if isinstance(input_dim, int) else tuple(input_dim)
        self.indexed = IndexedTransform(
            transform, index_dim, hidden_dims, input_dim=shape[0], context_dim=context_dim
        )
        self.input_dim: Any = input_dim
        self.index_dim: Any = self.indexed.index_dim
        self.index_shape, self.context_dim = self.indexed.index_shape, context_dim
        wide = hidden_dims if index_hidden_dims is None else index_hidden_dims

        def network() -> nn.Module:
            out_dim = 2 * self.index_shape[0]
            net = make_network(shape, out_dim, wide, context_dim=context_dim, zero_last=True)
            return _MeanOverPixels(net) if len(self.index_shape) < len(shape) else net

        self.index_net, self.reverse_net = network(), network()
        if informative:
            correlate_with_input(self.index_net, self.index_shape[0])
            self.reverse_net.load_state_dict(self.index_net.state_dict())

    def push(
        self, z: Tensor, noise: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """F(z; u), u, and log|det| of the map from (z, ε) and log r, `(2, *)`."""
        dims = len(self.index_shape)
        params = self.index_net(z, context)
        u, log_scale = affine_by(noise, params, inverse=False, event_dim=dims)
        affine, f = self.indexed.condition(u, context)
        a, ladj = affine.forward_and_ladj(z)
        value, inner = f.forward_and_ladj(a)
        log_r = log_normal_by(u, self.reverse_net(a, context), dims)
        return value, u, torch.stack([sum_event(log_scale, dims) + ladj + inner, log_r])

    def pull(
        self, value: Tensor, u: Index = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z, ε, and log|det| of the inverse map and log r, `(2, *)`."""
        f: Any = self.indexed.transform
        if context is not None:
            f = f.condition(context)
        a, inner = f.inverse_and_ladj(value)
        dims = len(self.index_shape)
        reverse = self.reverse_net(a, context)
        if not isinstance(u, Tensor):
            u = draw_by(reverse, dims) if u is None else u(reverse)
        affine, _ = self.indexed.condition(u, context)
        z, ladj = affine.inverse_and_ladj(a)
        params = self.index_net(z, context)
        noise, log_scale = affine_by(u, params, inverse=True, event_dim=dims)
        log_r = log_normal_by(u, reverse, dims)
        return z, noise, torch.stack([sum_event(log_scale, dims) + ladj + inner, log_r])


class _MeanOverPixels(nn.Module):
    """A network of images, `(*, C, H, W)` -> `(*, d, H, W)`, with the mean of its output: `(*, d)`."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x, context).mean((-2, -1))


@torch.no_grad()
def correlate_with_input(net: nn.Module, index_dim: int) -> None:
    """Initialises a network of z so that the location of u has an sd of about 1 over z, and its scale is 1/e.

    Xavier's initialisation for tanh keeps this sd for any number of layers of a multilayer perceptron.
    """
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    last = layers[-1]
    for layer in layers[:-1]:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, gain=5 / 3)
    # Convolutions have half of the scale behind their ReLU.
    scale = 1.5 if isinstance(last, nn.Linear) else 3.0
    weight, bias = last.parameters()
    nn.init.normal_(weight[:index_dim], std=scale / weight[0].numel() ** 0.5)
    nn.init.zeros_(weight[index_dim:])
    nn.init.zeros_(bias[:index_dim])
    nn.init.constant_(bias[index_dim:], -1.0)
