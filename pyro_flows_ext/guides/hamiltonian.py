"""`AutoHamiltonian`: a guide that moves along the dynamics of the posterior itself, latents with a momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..programs import LogJoint
from ..transforms import FlowTransform, Leapfrog, Whitening
from ..transforms.hamiltonian import Tempering
from ._augmented import AugmentedGuide
from ._hamiltonian import HamiltonianFlow, ModelPotential
from .base import GuideOptions

# Draws at a time: the dynamics of each run the whole model.
CHUNK = 1000


class AutoHamiltonian(AugmentedGuide):
    """A Hamiltonian guide: z_0 ~ N(m, s²), ρ_0 ~ N(0, mass / β_0), and `num_layers` leapfrog steps to (z_K, ρ_K).

    The potential is that of the posterior: minus the model's log joint at constrain(loc + L z), with the Jacobian of
    `constrain`. It has to be differentiable twice, but no network has to learn its shape: the start, step sizes,
    masses and with `tempering` ("quadratic" or "free") temperatures are all that is trained, (K + 3) D numbers, and
    the network of r. `step_size` is the first value of the steps, in the coordinates of `whiten`, in which a good
    start makes the posterior about N(0, I); see `transforms.Leapfrog`. A reverse model r(ρ_K | z_K), trained along,
    takes the momentum out again:

        ELBO = E_q(z,ρ) [log p(x, z) + log r(ρ | z) - log q(z, ρ)]  <=  log p(x).

    r is a diagonal normal distribution, N(0, mass) at first, with location and log-scale from a network of
    `reverse_hidden_dims` (`()`: linear). In Pyro, an auxiliary site `_AutoHamiltonian_latent` holds latents and
    momentum, a factor `_AutoHamiltonian_r` is -log r, and every ELBO is this bound. Importance weights are
    p(x, z) r(ρ | z) / q(z, ρ).

    Model and data are those of `setup`, or of the first call: later arguments do not move the guide, which is one
    distribution of latents like any other. Parameters of the model (`pyro.param`, modules) do move it, and get the
    gradient of the bound through it too. A file has neither model nor data: `attach` gives a loaded guide both.

    Cost: a draw takes K + 1 gradients of the log joint, and training differentiates them again; `log_prob_bound` and
    path gradients take as many again. In batches where the model can run many particles at once, else one by one.

    Raises what `AutoFlow` does; `ValueError` for a log joint that is another at every call (a subsampled plate,
    latents of the model that are hidden from this guide, noise that is no latent); and `TypeError` from `log_prob`
    and `get_transform`, which there are none of.

    Source: Salimans, Kingma & Welling 2015, Markov Chain Monte Carlo and Variational Inference: Bridging the Gap;
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
        factory: Any = partial(
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

        The latents must be those that the guide was set up on. Raises `ValueError` for a log joint that is random.
        """
        density = LogJoint(model, args, kwargs, latents=self.latents)
        self._flow.leapfrog.potential.attach(density)
        self._program = (model,)

    def _make_transform(self, loc: Tensor) -> FlowTransform:
        make: Any = self._flow_factory
        return make(self._placement(loc)[-1])  # type: ignore[no-any-return]

    @property
    def whitening(self) -> Whitening:
        """The fixed affine map behind the flow, in whose coordinates it moves; `whiten` sets it."""
        return self._flow.whitening  # type: ignore[no-any-return]

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
