"""`FlowGuide`: the common base of the guides that have one flow over all latent variables of a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypedDict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..ops import quantiles as elementwise_quantiles
from ..transforms import FlowTransform, Whitening
from ..transforms.affine import check_whitening
from ._latents import ModelLatents
from ._setup import argument_shapes, check_init_scale, init_to_median

# Draws for `median` and `quantiles`: the 5 % quantile of a normal then has a standard error of .02 sd.
QUANTILE_DRAWS = 10_000


class GuideOptions(TypedDict, total=False):
    """Keywords that all flow guides share: see `FlowGuide`."""

    init_loc_fn: Callable[..., Any]
    init_scale: float


class FlowGuide(ModelLatents):
    """A guide with one flow from noise to all latents: latents = constrain(transform(noise)).

    A subclass defines `_make_transform`, `whitening` and `get_base_dist`. The density is exact in `AutoFlow`, and has a
    lower bound alone in `AutoCIF` and `AutoHamiltonian`: `exact_log_prob` is False there. Device and dtype follow the model.

    Args:
        model: a Pyro model with continuous latents.
        flow_factory: called by `_make_transform`; dropped from a pickled guide, whose parameters exist already.
        init_loc_fn: from a site to its initial value, as in Pyro's guides.
        init_scale: initial scale of the unconstrained latents.

    Raises:
        ValueError: at setup, for a discrete latent and a local latent under a subsampled plate; at calls, for arguments
            that change the shape of a latent, and for parameters of another guide in the parameter store.
    """

    exact_log_prob = True
    transform: Any

    def __init__(
        self,
        model: Callable[..., Any],
        flow_factory: Callable[..., Any],
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ):
        super().__init__(model, init_loc_fn)
        self._flow_factory = flow_factory
        self._init_scale = check_init_scale(init_scale)
        self._set_up_as: tuple[float, ...] = ()

    @abstractmethod
    def _make_transform(self, loc: Tensor) -> FlowTransform:
        """The transform from noise to the unconstrained latents, placed at `loc` `(D,)`."""

    @property
    @abstractmethod
    def whitening(self) -> Whitening:
        """The fixed affine map behind the flow; `whiten` sets it."""

    @abstractmethod
    def get_base_dist(self) -> dist.TorchDistribution:
        """The distribution of the noise, of independent coordinates."""

    # --- setting up ---

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with torch.no_grad():  # a graph in the prototype could not be copied
                self._learn_latents(*args, **kwargs)
                loc = self._init_loc()
                transform = self._make_transform(loc).to(dtype=loc.dtype, device=loc.device)
        except Exception:
            self.prototype_trace = None  # a failed setup leaves the guide as it was: not set up
            raise
        self._known_shapes = {argument_shapes(args, kwargs)}
        self.transform = transform
        self._set_up_as = _fingerprint(transform)
        self._check_param_store()

    def whiten(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Places the guide at mean loc and covariance L Lᵀ in unconstrained space.

        The parameters of the flow stay as they are; before training the flow is near the identity.

        Args:
            loc: `(D,)`.
            scale_tril: L `(D, D)`, lower triangular.

        Raises:
            ValueError: if the guide is not set up, or the shapes do not fit.
        """
        whitening = self.whitening
        check_whitening(loc, scale_tril)
        if loc.shape != whitening.loc.shape:
            raise ValueError(
                f"loc: expected shape {tuple(whitening.loc.shape)}, got {tuple(loc.shape)}"
            )
        with torch.no_grad():
            whitening.loc.copy_(loc)
            whitening.scale_tril.copy_(scale_tril.tril())

    @property
    def is_untrained(self) -> bool:
        """Whether the guide is set up and its parameters and whitening are as the setup left them."""
        return self.prototype_trace is not None and _fingerprint(self.transform) == self._set_up_as

    # --- the AutoContinuous protocol ---

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The distribution of the unconstrained latents, with auxiliary variables behind them where the guide has some."""
        return dist.TransformedDistribution(self.get_base_dist(), self.transform)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every latent; the same arguments as the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._check_arguments(args, kwargs)
        if torch.is_grad_enabled():
            self._check_param_store()
        vector = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for latent, image in self._images(vector, args, kwargs):
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[latent.name]:
                    stack.enter_context(plates[frame.name])
                if latent.name in self._completed:
                    # The masked entries are in the density of the `Delta`: the site has the mask of the model already.
                    stack.enter_context(poutine.mask(mask=True))
                result[latent.name] = pyro.sample(latent.name, image)
        return result

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Constrained draws, without gradient.

        Args:
            num_samples: number of draws.
            args, kwargs: the model's arguments, for bounds that depend on them; those of the last call if there are none.

        Returns:
            site -> `(num_samples, *shape)`.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        vector = self.get_posterior().sample(torch.Size([num_samples]))[..., : self.latent_dim]
        images = self._images(vector, args, kwargs, in_plates=False)
        return {latent.name: image.v for latent, image in images}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, elementwise, from 10,000 draws: site -> `(len(quantiles), *shape)`."""
        samples = self.sample_posterior(QUANTILE_DRAWS, *args, **kwargs)
        return {name: elementwise_quantiles(value, quantiles) for name, value in samples.items()}


@torch.no_grad()
def _fingerprint(module: torch.nn.Module) -> tuple[float, ...]:
    """Numbers that change whenever a parameter or a buffer does."""

    def one(t: Tensor) -> float:
        weights = torch.linspace(1, 2, t.numel(), dtype=torch.float64, device=t.device)
        return float((t.double() * weights.reshape(t.shape)).sum())

    return tuple(one(t) for t in module.state_dict().values() if t.is_floating_point())
