"""`FlowVAE`: an exact flow from data to z, and a density of z learned from a low-dimensional noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MLP
from ..ops import check_positive
from ..transforms import FlowTransform
from ._bound import BoundedDensity
from .normal import draw_by, log_normal_by, log_standard_normal


class FlowVAE(BoundedDensity):
    """x = f(z), z ~ N(μ(ε), σ(ε)²), ε ~ N(0, I) of `latent_dim` numbers: a flow whose base is a small VAE.

        log p(x) >= E_q(ε|z) [log p(ε) + log p(z | ε) - log q(ε | z)] + log|det Df⁻¹(x)|,    z = f⁻¹(x).

    The flow is exact; the few numbers ε describe z, and one can sample and interpolate along them. `log_prob` is one
    draw of the bound, `log_prob_bound` its importance-weighted form. The scale of p(z | ε) is learned, within 1/1000
    and 1000: a fixed one would decide how much of z is noise. `fit_density` trains the networks before the flow:
    trained all at once, the flow makes z normal first, and ε stays unused.
    Cost: `rsample` a pass of decoder and flow, `log_prob` one of flow, encoder and decoder, and `log_prob_bound` K of
    the networks and one of the flow for each chunk.

    Args:
        transform: f, of vectors, or from vectors to images (`MultiScale`), forward towards the data.
        input_dim: D, length of z.
        latent_dim: length of ε.
        encoder: a module `(*, D)` -> `(*, 2 latent_dim)`, location and raw log-scale of q(ε | z).
        decoder: a module `(*, latent_dim)` -> `(*, 2 D)`, location and raw log-scale of p(z | ε).
        hidden_dims: widths of the default networks, multilayer perceptrons.

    Raises:
        TypeError: for a transform that is no `FlowTransform`.
        ValueError: for networks of other sizes, or a transform of no vectors.

    References:
        Das, Abbeel & Spanos 2019, Dimensionality Reduction Flows, sec. 3.1, eq. 11.
    """

    can_standardize = True

    def __init__(
        self,
        transform: FlowTransform,
        input_dim: int,
        latent_dim: int,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        validate_args: bool | None = None,
    ):
        if not isinstance(transform, FlowTransform):
            raise TypeError(
                f"transform: expected a FlowTransform, got a {type(transform).__name__}"
            )
        D, L = check_positive("input_dim", input_dim), check_positive("latent_dim", latent_dim)
        if transform.domain.event_dim != 1:
            raise ValueError(f"transform: expected one of vectors, got one of {transform.domain}")
        super().__init__(event_shape=transform.forward_shape((D,)), validate_args=validate_args)
        self.latent_dim = L
        self.transform = transform
        # Zeros in both would be a saddle: with ε and z independent, neither network has a gradient.
        self.encoder = MLP(D, 2 * L, hidden_dims) if encoder is None else encoder
        self.decoder = MLP(L, 2 * D, hidden_dims, zero_last=True) if decoder is None else decoder
        for name, net, size, expected in (
            ("encoder", self.encoder, D, 2 * L),
            ("decoder", self.decoder, L, 2 * D),
        ):
            with torch.no_grad():
                some = next(net.parameters(), torch.empty(0))
                got = tuple(net(some.new_zeros(1, size)).shape)
            if got != (1, expected):
                raise ValueError(
                    f"{name}: expected (*, {size}) -> (*, {expected}), got shape {got} for (1, {size})"
                )

    @property
    def trained_later(self) -> nn.Module:
        """The parts that `fit_density` keeps fixed in its first steps."""
        return self.transform

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws `(*sample_shape, *batch_shape, *event_shape)`, with a gradient."""
        some = next(self.parameters())
        noise = some.new_empty(torch.Size(sample_shape) + self.batch_shape + (self.latent_dim,))
        return self.decode(noise.normal_(), deterministic=False)

    def decode(self, noise: Tensor, *, deterministic: bool = True) -> Tensor:
        """f(μ(ε)) for ε = `noise` `(*, latent_dim)`, or f at a draw of z given ε: `(*, *event_shape)`."""
        params = self.decoder(noise)
        z = params.chunk(2, -1)[0] if deterministic else draw_by(params)
        return self._with_units(self.transform)(z)

    def encode(self, value: Tensor) -> Tensor:
        """The mean of q(ε | f⁻¹(value)): `(*, *event_shape)` -> `(*, latent_dim)`."""
        self._check_value(value)
        return self.encoder(self._with_units(self.transform).inv(value)).chunk(2, -1)[0]

    def interpolate(self, start: Tensor, end: Tensor, num: int = 8) -> Tensor:
        """f(μ(ε)) along the straight line between the codes of two values: `(num, *, *event_shape)`, both ends included."""
        a, b = self.encode(start), self.encode(end)
        share = torch.linspace(0, 1, check_positive("num", num)).to(a)
        return self.decode(torch.lerp(a, b, share.reshape(-1, *[1] * a.dim())))

    @property
    def support(self) -> Any:
        return self._with_units(self.transform).codomain

    def _log_weights(self, value: Tensor) -> Tensor:
        z, ladj = self._with_units(self.transform).inverse_and_ladj(value)
        return self._log_weights_of(z) + ladj

    def _log_weights_of(self, z: Tensor) -> Tensor:
        """log p(z, ε) - log q(ε | z) for one ε ~ q by row: `(*, D)` -> `(*)`."""
        encoded = self.encoder(z)
        noise = draw_by(encoded)
        log_p = log_standard_normal(noise) + log_normal_by(z, self.decoder(noise))
        return log_p - log_normal_by(noise, encoded)

    def _log_mass(self, value: Tensor) -> Tensor:
        # The repeated values have one z, and the flow is the dear part.
        z, ladj = self._with_units(self.transform).inverse_and_ladj(value[0])
        return self._log_weights_of(z.expand(len(value), *z.shape)).logsumexp(0) + ladj
