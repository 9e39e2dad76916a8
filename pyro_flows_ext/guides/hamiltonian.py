"""`AutoHamiltonian`: a guide of latents and momentum that follows the Hamiltonian dynamics of the posterior itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from ..distributions.normal import draw_by, log_normal_by
from ..nn import MLP
from ..programs import LogJoint
from ..transforms import ElementwiseAffine, FlowTransform, Leapfrog, Whitening
from ..transforms.hamiltonian import Tempering
from ._augmented import AugmentedFlow, AugmentedGuide
from .base import GuideOptions
from .tails import whitening_at

# Draws at a time: the dynamics of each run the whole model.
CHUNK = 1000

# A second run of the model at the same points must give the same densities: see `ModelPotential.attach`.
NUM_CHECKED = 3


class AutoHamiltonian(AugmentedGuide):
    """A Hamiltonian guide: z_0 ~ N(m, s²), ρ_0 ~ N(0, mass / β_0), and `num_layers` leapfrog steps to (z_K, ρ_K).

    The potential is minus the model's log joint at constrain(loc + L z), with the Jacobian of `constrain`. It must be twice
    differentiable, but no network has to learn its shape: the trained parameters are the start, step sizes, masses and
    temperatures, (K + 3) D numbers, and a network of the reverse model r(ρ_K | z_K):

        ELBO = E_q(z,ρ) [log p(x, z) + log r(ρ | z) - log q(z, ρ)]  <=  log p(x).

    r is a diagonal normal, N(0, mass) at first, with location and log-scale from the network. Every Pyro ELBO is this bound;
    importance weights are p(x, z) r(ρ | z) / q(z, ρ).

    The potential is that of the model and data of `setup`, or of the first call; later arguments do not change the guide.
    Parameters of the model (`pyro.param`, modules) do, and get the gradient of the bound through it too. A file has neither
    model nor data: `attach` sets both on a loaded guide.

    Cost: a draw takes K + 1 gradients of the log joint, and training differentiates them again; `log_prob_bound` and
    path gradients take as many again. In batches if the model can run many particles at once, otherwise one by one.

    Args:
        model: a Pyro model with continuous latents.
        num_layers: K, the number of leapfrog steps.
        step_size: initial size of the steps, in the coordinates of `whiten`, where the posterior is about N(0, I) after a
            warm start; see `transforms.Leapfrog`.
        tempering: learned temperatures, "quadratic" or "free"; False for none.
        reverse_hidden_dims: widths of the network of r; `()` for a linear one.
        options: `init_loc_fn` and `init_scale`: see `AutoFlow`.

    Raises:
        ValueError: as in `AutoFlow`; and for a log joint that differs between calls (a subsampled plate, latents of the
            model that are hidden from this guide, noise outside of sample sites).

    References:
        Salimans, Kingma & Welling 2015, Markov Chain Monte Carlo and Variational Inference: Bridging the Gap;
        tempering: Caterini, Doucet & Sejdinovic 2018, Hamiltonian Variational Auto-Encoder.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 5,
        *,
        step_size: float = 0.25,
        tempering: Tempering = False,
        reverse_hidden_dims: Sequence[int] = (16, 16),
        **options: Unpack[GuideOptions],
    ):
        factory = partial(
            _make_flow,
            num_layers=num_layers,
            step_size=step_size,
            tempering=tempering,
            hidden_dims=tuple(reverse_hidden_dims),
        )
        super().__init__(model, factory, **options)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            self.attach(self._program[0], *args, **kwargs)
        except Exception:
            self.prototype_trace = None
            raise

    def attach(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Makes the log joint of `model(*args, **kwargs)` the potential: for a guide from a file, or for other data.

        Args:
            model: a model with the latents that the guide was set up on.
            args, kwargs: its arguments.

        Raises:
            ValueError: for a log joint that is random.
        """
        density = LogJoint(model, args, kwargs, latents=self.latents)
        self._flow.leapfrog.potential.attach(density)
        self._program = (model,)

    def _make_transform(self, loc: Tensor) -> FlowTransform:
        return self._flow_factory(whitening_at(loc, self._init_scale))

    @property
    def whitening(self) -> Whitening:
        """The fixed affine map between the coordinates of the dynamics and the unconstrained latents; `whiten` sets it."""
        return self._flow.whitening

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Constrained draws: site -> `(num_samples, *shape)`, without gradient."""
        sizes = [min(CHUNK, num_samples - i) for i in range(0, num_samples, CHUNK)] or [0]
        parts = [super(AutoHamiltonian, self).sample_posterior(n, *args, **kwargs) for n in sizes]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _make_flow(
    whitening: Whitening,
    *,
    num_layers: int,
    step_size: float,
    tempering: Tempering,
    hidden_dims: Sequence[int],
) -> HamiltonianFlow:
    leapfrog = Leapfrog(
        ModelPotential(whitening),
        whitening.input_dim,
        num_layers,
        step_size=step_size,
        tempering=tempering,
    )
    return HamiltonianFlow(leapfrog, whitening, hidden_dims)


class ModelPotential(nn.Module):
    """U(z) = -log p(x, T(y)) - log|det T'(y)| at y = loc + L z, in nats: z `(*, D)` -> `(*)`.

    T maps ℝᴰ to the supports of the latents, and `whitening` holds loc and L, whose constant log|det L| is left out.
    Has no parameters of its own. A copy shares model and data with the original; a pickle has neither, until `attach`.
    A model that cannot run many particles at once runs row by row.
    """

    def __init__(self, whitening: Whitening):
        super().__init__()
        self._whitening = (whitening,)  # in a tuple: it is a part of the flow already
        self._density: LogJoint | None = None

    def attach(self, density: LogJoint) -> None:
        """Sets -U to this density of y. Raises `ValueError` for a density that differs between calls."""
        expected = "the potential of a Hamiltonian guide: expected a log joint that is a function of the latents alone"
        if density.subsampled:
            raise ValueError(
                f"{expected}, got the subsampled plates {density.subsampled}, which draw other rows in every run: set the guide "
                "up on the full data, or use AutoFlow, which needs no gradient of the model"
            )
        with torch.no_grad():
            loc, scale_tril = self._whitening[0].loc, self._whitening[0].scale_tril
            noise = torch.randn(NUM_CHECKED, len(loc), dtype=loc.dtype, device=loc.device)
            points = loc + noise @ scale_tril.mT
            rows, again = density(points), density(points)
            if not torch.allclose(rows, again, rtol=1e-5, atol=1e-6):
                raise ValueError(
                    f"{expected}; two runs at the same latents gave {rows.tolist()} and {again.tolist()}: remove randomness "
                    "outside of sample sites (dropout, torch.randn, sites hidden by poutine.block), or use AutoFlow"
                )
        self._density = density

    def forward(self, z: Tensor) -> Tensor:
        if self._density is None:
            raise ValueError(
                "this guide comes from a file, which holds neither its model nor the data: call guide.attach(model, *args) first"
            )
        y, _ = self._whitening[0].forward_and_ladj(z)
        return -self._density(y)

    def tensors(self) -> list[Tensor]:
        """The model's parameters, on which a value depends beside z."""
        return [] if self._density is None else self._density.parameters

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_density": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = memo[id(self)] = type(self)(copy.deepcopy(self._whitening[0], memo))
        new._density = self._density
        return new


class HamiltonianFlow(AugmentedFlow):
    """(ε, η) -> (y, ρ_K): leapfrog steps from z_0 = m + s ⊙ ε, ρ_0 = √(mass / β_0) ⊙ η to (z_K, ρ_K); y = loc + L z_K.

    Vectors are `(*, 2D)`; log|det| is exact. The reverse model r(ρ_K | z_K) is a diagonal normal distribution: a network of
    z_K, zero at first, shifts the location and the log-scale of N(0, mass).
    Cost: the gradients of the potential that `Leapfrog` takes, in both directions.
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
