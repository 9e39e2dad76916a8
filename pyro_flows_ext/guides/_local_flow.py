"""The flow over the latents of one datum, and its density: exact, or known as a bound. A strategy of `AutoAmortizedFlow`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..distributions.indexed_layer import IndexedLayer
from ..transforms import (
    ComposeFlow,
    ElementwiseAffine,
    FlowTransform,
    HouseholderSylvester,
    Planar,
    iaf,
    realnvp,
)
from .cif import STEPS, IndexedFlow

# (dimension of the latents, dimension of the context) -> a transform; of "cif", its layers.
ConditionalFactory = Callable[[int, int], FlowTransform]

# Default number of layers of each flow.
NUM_LAYERS = {"planar": 8, "sylvester": 4, "iaf": 2, "realnvp": 4, "cif": 2}


class LocalFlow(ABC):
    """How the posterior of a datum follows from a flow: its transform, its density, and factors beside it."""

    exact_log_prob: bool

    @abstractmethod
    def place(self, flow: Any, affine: ElementwiseAffine) -> FlowTransform:
        """The transform of the posterior: what a factory returned, or None, with an affine map behind it."""

    @abstractmethod
    def noise_dim(self, transform: FlowTransform, latent_dim: int) -> int:
        """Number of coordinates of the noise."""

    @abstractmethod
    def weigh(self, name: str, posterior: dist.TransformedDistribution, draws: Tensor) -> None:
        """Adds the factor `name` that makes an ELBO a bound for these draws, if there is one."""

    @abstractmethod
    def log_prob(self, posterior: dist.TransformedDistribution, z: Tensor) -> Tensor:
        """log q of the unconstrained latents z `(*, D)`."""

    @abstractmethod
    def log_prob_bound(
        self, posterior: dist.TransformedDistribution, z: Tensor, num_particles: int
    ) -> Tensor:
        """A lower bound on log q of the unconstrained latents z `(*, D)`."""


class ExactLocalFlow(LocalFlow):
    """A flow of the latents alone."""

    exact_log_prob = True

    def place(self, flow: Any, affine: ElementwiseAffine) -> FlowTransform:
        return ComposeFlow([affine] if flow is None else [flow, affine])

    def noise_dim(self, transform: FlowTransform, latent_dim: int) -> int:
        return latent_dim

    def weigh(self, name: str, posterior: dist.TransformedDistribution, draws: Tensor) -> None:
        pass

    def log_prob(self, posterior: dist.TransformedDistribution, z: Tensor) -> Tensor:
        return posterior.log_prob(z)

    def log_prob_bound(
        self, posterior: dist.TransformedDistribution, z: Tensor, num_particles: int
    ) -> Tensor:
        return self.log_prob(posterior, z)


class IndexedLocalFlow(LocalFlow):
    """A continuously indexed flow of latents and indices, with a reverse model: see `AutoCIF`."""

    exact_log_prob = False

    def place(self, flow: Any, affine: ElementwiseAffine) -> FlowTransform:
        return IndexedFlow(flow, affine)

    def noise_dim(self, transform: FlowTransform, latent_dim: int) -> int:
        return transform.input_dim

    def weigh(self, name: str, posterior: dist.TransformedDistribution, draws: Tensor) -> None:
        flow: Any = posterior.transforms[0]
        pyro.factor(name, -flow.log_reverse(draws), has_rsample=True)

    def log_prob(self, posterior: dist.TransformedDistribution, z: Tensor) -> Tensor:
        raise TypeError(
            'flow="cif": log q(z_n | x_n) = log ∫ q(z_n, u | x_n) du is intractable; use log_prob_bound, a lower bound, or for '
            "importance weights ImportanceWeightedELBO or diagnostics.importance, which weigh latents and indices together"
        )

    def log_prob_bound(
        self, posterior: dist.TransformedDistribution, z: Tensor, num_particles: int
    ) -> Tensor:
        flow: Any = posterior.transforms[0]
        return flow.log_prob_bound(posterior.base_dist, z, num_particles)


def local_flow(
    flow: str | ConditionalFactory | None,
    num_layers: int | None,
    hidden_dims: Sequence[int] | None,
) -> tuple[LocalFlow, Callable[[int, int], Any] | None]:
    """The strategy, and the factory from (D, H): of the flow of that name, or the callable as it is; None for no flow."""
    if flow is None or not isinstance(flow, str):
        if flow is not None and not callable(flow):
            raise TypeError(
                f"flow: expected a name, None or a callable from (D, H) to a transform, got {flow!r}"
            )
        if num_layers is not None or hidden_dims is not None:
            raise ValueError(
                "num_layers and hidden_dims: expected None where flow is not a name, got "
                f"{num_layers!r} and {hidden_dims!r}; set both in the callable"
            )
        return ExactLocalFlow(), flow
    if flow not in NUM_LAYERS:
        raise ValueError(f"flow: expected one of {', '.join(NUM_LAYERS)}, or None; got {flow!r}")
    if num_layers is None:
        num_layers = NUM_LAYERS[flow]
    strategy = IndexedLocalFlow() if flow == "cif" else ExactLocalFlow()
    return strategy, partial(FACTORIES[flow], num_layers, hidden_dims)


def _networked(preset: Any, num_layers: int, hidden_dims: Any, dim: int, context_dim: int) -> Any:
    return preset(dim, num_layers=num_layers, hidden_dims=hidden_dims, context_dim=context_dim)


def _linear(layer: Any, num_layers: int, hidden_dims: Any, dim: int, context_dim: int) -> Any:
    """Layers whose parameters are linear in the features, unless `hidden_dims` is given."""
    widths = () if hidden_dims is None else hidden_dims
    return layer(dim, num_layers=num_layers, context_dim=context_dim, hidden_dims=widths)


def _indexed(num_layers: int, hidden_dims: Any, dim: int, context_dim: int) -> list[IndexedLayer]:
    widths = (64, 64) if hidden_dims is None else tuple(hidden_dims)
    # Steps that draw in one pass; splines, since affine steps are poor at several modes.
    steps = STEPS["nsf-ar"](
        dim, num_layers=num_layers, hidden_dims=hidden_dims, context_dim=context_dim
    )
    return [IndexedLayer(f, dim, hidden_dims=widths, context_dim=context_dim) for f in steps]


# (num_layers, hidden_dims, D, H) -> the flow, or its layers. Of the three Sylvester kinds, Householder's Q is smooth in the
# features. Gram-Schmidt's jumps where a matrix becomes singular, as it does along a curve of data, and its gradient is infinite.
FACTORIES: dict[str, Callable[..., Any]] = {
    "planar": partial(_linear, Planar),
    "sylvester": partial(_linear, HouseholderSylvester),
    "iaf": partial(_networked, iaf),
    "realnvp": partial(_networked, realnvp),
    "cif": _indexed,
}
