"""Latents and their momentum together, as a flow of noise along the dynamics of a model's posterior."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..distributions.normal import draw_by, log_normal_by
from ..nn import MLP
from ..programs import LogJoint
from ..transforms import ElementwiseAffine, Leapfrog, Whitening
from ._augmented import AugmentedFlow

# A run of the model in a batch must come to what its runs one by one do: see `ModelPotential.attach`.
NUM_CHECKED, RTOL, ATOL = 3, 1e-4, 1e-3


class ModelPotential(nn.Module):
    """U(z) = -log p(x, T(y)) - log|det T'(y)| at y = loc + L z, in nats: z `(*, D)` -> `(*)`.

    T takes ℝᴰ to the supports of the latents, and `whitening` holds loc and L, whose constant log|det L| is left out.
    Has no parameters: those of the model are the model's. A copy shares model and data with the original, and one in a
    file goes without: `attach` gives them back. A model that cannot run many particles at once runs row by row.
    """

    def __init__(self, whitening: Whitening):
        super().__init__()
        self._whitening = (whitening,)  # in a tuple: it is a part of the flow already
        self._density: LogJoint | None = None

    def attach(self, density: LogJoint) -> None:
        """Takes this density of y for -U. Raises `ValueError` for one that gives another value at every call."""
        name = "the potential of a Hamiltonian guide is the model's log joint, one function of its latents"
        if density.subsampled:
            raise ValueError(
                f"{name}; under the subsampled plates {density.subsampled} it is another in every run: set the guide "
                "up on the full data, or use AutoFlow, which needs no gradient of the model"
            )
        with torch.no_grad():
            loc, scale_tril = self._whitening[0].loc, self._whitening[0].scale_tril
            noise = torch.randn(NUM_CHECKED, len(loc), dtype=loc.dtype, device=loc.device)
            points = loc + noise @ scale_tril.mT
            rows, again = density(points), density(points)
            if not torch.allclose(rows, again, rtol=1e-5, atol=1e-6):
                raise ValueError(
                    f"{name}; two runs at the same latents gave {rows.tolist()} and {again.tolist()}: take out what is "
                    "random in the model and no sample site (dropout, torch.randn, sites hidden by poutine.block), or "
                    "use AutoFlow"
                )
        self._density = density

    def forward(self, z: Tensor) -> Tensor:
        if self._density is None:
            raise ValueError(
                "this guide comes from a file, which holds neither its model nor the data: give them back by "
                "guide.attach(model, *args)"
            )
        y, _ = self._whitening[0].forward_and_ladj(z)
        return -self._density(y)

    def tensors(self) -> list[Tensor]:
        """What the last value depended on beside z, as far as it can be seen: the model's parameters."""
        return [] if self._density is None else self._density.parameters

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_density": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = type(self)(copy.deepcopy(self._whitening[0], memo))
        new._density = self._density
        return new


class HamiltonianFlow(AugmentedFlow):
    """(ε, η) -> (y, ρ_K): leapfrog steps from z_0 = m + s ⊙ ε, ρ_0 = √(mass / β_0) ⊙ η to (z_K, ρ_K); y = loc + L z_K.

    Of vectors `(*, 2D)`; log|det| exact. The reverse model r(ρ_K | z_K) is a diagonal normal distribution whose
    location and scale are those of N(0, mass) moved by a network of z_K, which starts at no move.
    Cost: as many gradients of the potential as of `Leapfrog`, in both directions.
    """

    def __init__(self, leapfrog: Leapfrog, whitening: Whitening, hidden_dims: Sequence[int] = ()):
        super().__init__()
        self.latent_dim = D = leapfrog.latent_dim
        self.input_dim = 2 * D
        self.start = ElementwiseAffine(D)
        self.leapfrog = leapfrog
        self.whitening = whitening
        self.reverse_net = MLP(D, 2 * D, hidden_dims, zero_last=True)

    def _push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        noise, rest = self._split("x", x)
        z, ladj = self.start.forward_and_ladj(noise)
        scale = self.leapfrog.momentum_scale
        end, ladj_path = self.leapfrog.forward_and_ladj(torch.cat([z, scale * rest], -1))
        z, momentum = end.chunk(2, -1)
        log_r = self._log_r(z, momentum)
        y, ladj_end = self.whitening.forward_and_ladj(z)
        ladj = ladj + scale.log().sum(-1) + ladj_path + ladj_end
        return torch.cat([y, momentum], -1), torch.stack([ladj, log_r])

    def _pull(self, z: Tensor, rest: Tensor | None) -> tuple[Tensor, Tensor]:
        z, ladj_end = self.whitening.inverse_and_ladj(z)
        if rest is None:
            rest = self.leapfrog.mass.sqrt() * draw_by(self.reverse_net(z))
        log_r = self._log_r(z, rest)
        begin, ladj_path = self.leapfrog.inverse_and_ladj(torch.cat([z, rest], -1))
        z, momentum = begin.chunk(2, -1)
        noise, ladj = self.start.inverse_and_ladj(z)
        scale = self.leapfrog.momentum_scale
        ladj = ladj - scale.log().sum(-1) + ladj_path + ladj_end
        return torch.cat([noise, momentum / scale], -1), torch.stack([ladj, log_r])

    def _log_r(self, z: Tensor, momentum: Tensor) -> Tensor:
        """log r(ρ | z), `(*)`."""
        log_mass = self.leapfrog.log_mass
        standard = momentum * (-log_mass / 2).exp()
        return log_normal_by(standard, self.reverse_net(z)) - log_mass.sum(-1) / 2

    def _watched(self) -> list[Tensor]:
        potential = self.leapfrog.potential
        return potential.tensors() if isinstance(potential, ModelPotential) else []

    def extra_repr(self) -> str:
        return self.leapfrog.extra_repr()
