"""`AutoFlow`, the flow guide with an exact density, and its ready-made forms: one line in place of `AutoNormal`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from typing_extensions import Unpack

from ..transforms import (
    ComposeFlow,
    FlowTransform,
    Whitening,
    iaf,
    maf,
    nsf,
    planar,
    radial,
    realnvp,
    residual,
    sylvester,
)
from ..transforms.by_name import PRESETS
from ..transforms.presets import has_constant_networks
from ._neutra import called_by_neutra, for_neutra
from .base import FlowGuide, GuideOptions
from .tails import BASE_DF, base_distribution, layers_behind

FlowFactory = Callable[[int], FlowTransform]


# The flows that `AutoFlow(model, "name")` builds.
FLOWS: dict[str, FlowFactory] = {
    name: partial(preset.make, num_layers=preset.guide_layers, **preset.guide_options)
    for name, preset in PRESETS.items()
    if not preset.is_circular
}


def _networked(
    preset: Callable[..., FlowTransform],
    hidden_dims: Sequence[int] | None,
    input_dim: int,
    **options: Any,
) -> FlowTransform:
    """The preset, without hidden layers where `has_constant_networks`, whatever widths are given."""
    widths = None if has_constant_networks(input_dim) else hidden_dims
    return preset(input_dim, hidden_dims=widths, **options)


class FlowOptions(GuideOptions, total=False):
    """Keywords of the guides with an exact density: see `AutoFlow`."""

    base_df: float


class AutoFlow(FlowGuide):
    """A flow guide: latents = constrain(loc + L (m + s ⊙ t(flow(z)))), exact density.

    The base z has independent coordinates of mean 0 and variance 1. Behind the flow, a sinh-arcsinh map t learns tails and
    skewness of each coordinate, and an elementwise affine map learns (m, s). A fixed map (loc, L) places the guide: at
    `init_loc_fn`'s point with scale `init_scale` at first, then at the arguments of `whiten`.

    Parameters exist after `setup(*args)` or the first call. Device and dtype follow the model.

    Args:
        model: a Pyro model with continuous latents.
        flow: a name in `FLOWS`, or a callable from the latent dimension D to a `FlowTransform`. "iaf" did best on reference
            posteriors (docs/results.md).
        init_loc_fn: from a site to its initial value, as in Pyro's guides.
        init_scale: initial scale of the unconstrained latents.
        base_df: degrees of freedom of the base, Student's t, whose tails keep importance weights bounded; `math.inf` for a
            normal base.

    Raises:
        TypeError: for a flow that is neither a name nor a callable, or that returns no `FlowTransform`.
        ValueError: for arguments out of range; at setup and at calls as in `FlowGuide`.

    Example:
        >>> model = lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = AutoFlow(model, "nsf")
        >>> guide.setup()
        >>> guide.sample_posterior(5)["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | FlowFactory = "iaf",
        *,
        base_df: float = BASE_DF,
        **options: Unpack[GuideOptions],
    ):
        if not base_df > 2:
            raise ValueError(
                f"base_df: expected more than 2 degrees of freedom, for a variance, got {base_df!r}"
            )
        if isinstance(flow, str):
            if flow not in FLOWS:
                raise ValueError(f"flow: expected one of {', '.join(FLOWS)}, got {flow!r}")
            flow = FLOWS[flow]
        if not callable(flow):
            raise TypeError(
                "flow: expected a name or a callable from the latent dimension to a FlowTransform, "
                f"got {flow!r}"
            )
        super().__init__(model, flow, **options)
        self.base_df = base_df

    def _make_transform(self, loc: Tensor) -> FlowTransform:
        flow = self._flow_factory(self.latent_dim)
        if not isinstance(flow, FlowTransform):
            raise TypeError(f"flow: expected it to return a FlowTransform, got {flow!r}")
        return ComposeFlow([flow, *layers_behind(loc, self._init_scale)])

    @property
    def whitening(self) -> Whitening:
        self._require_setup()
        return self.transform[-1]

    def get_base_dist(self) -> dist.TorchDistribution:
        """The base distribution of the flow on `(D,)`: mean 0, variance 1, `base_df` degrees of freedom."""
        return base_distribution(self.base_df, self.whitening.loc)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The map from the base to the unconstrained latents."""
        self._require_setup()
        if called_by_neutra():
            return for_neutra(self.transform, self.latents, dict(self._sites()))  # type: ignore[return-value]
        return self.transform

    def log_prob(self, samples: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """log q(samples), exact, in constrained space, in nats.

        Args:
            samples: site -> `(*, *shape)`, any values.
            args, kwargs: the model's arguments, for bounds that depend on them; those of the last call if there are none.

        Returns:
            `(*)`; -inf outside the support.

        Raises:
            ValueError: if the sites or shapes do not fit.
        """
        latent, ladj, inside = self._unconstrain(samples, args, kwargs)
        return torch.where(inside, self.get_posterior().log_prob(latent) - ladj, -torch.inf)


class AutoPlanar(AutoFlow):
    """A guide of `num_layers` planar layers over all latents: see `AutoFlow` and `transforms.Planar`.

    O(KD) parameters: for many latents with few, strong dependencies.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 16,
        **options: Unpack[FlowOptions],
    ):
        super().__init__(model, partial(planar, num_layers=num_layers), **options)


class AutoRadial(AutoFlow):
    """A guide of `num_layers` radial layers over all latents: see `AutoFlow` and `transforms.Radial`.

    Each layer widens or narrows the density around a point; it cannot turn or correlate, so the gain over a
    mean-field guide is small beyond a few dimensions.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 16,
        **options: Unpack[FlowOptions],
    ):
        super().__init__(model, partial(radial, num_layers=num_layers), **options)


class AutoSylvester(AutoFlow):
    """A guide of `num_layers` Sylvester layers over all latents: see `AutoFlow` and `transforms.sylvester`.

    `kind` is "orthogonal", "householder" or "triangular"; `rank=None` is full rank, O(KD²) parameters; take a lower
    one beyond some hundred latents.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 4,
        kind: str = "orthogonal",
        rank: int | None = None,
        **options: Unpack[FlowOptions],
    ):
        flow = partial(sylvester, num_layers=num_layers, kind=kind, rank=rank)
        super().__init__(model, flow, **options)


class AutoRealNVP(AutoFlow):
    """A guide of `num_layers` affine coupling layers over all latents: see `AutoFlow` and `transforms.realnvp`.

    Draws, and scores any values, in one pass a layer. For two latents and more.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 8,
        hidden_dims: Sequence[int] | None = None,
        **options: Unpack[FlowOptions],
    ):
        flow = partial(realnvp, num_layers=num_layers, hidden_dims=hidden_dims)
        super().__init__(model, flow, **options)


class AutoNSF(AutoFlow):
    """A guide of `num_layers` spline coupling layers over all latents: see `AutoFlow` and `transforms.nsf`.

    `kind` is "coupling" or "autoregressive". The most flexible of the exact ones: several modes, sharp edges.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 4,
        hidden_dims: Sequence[int] | None = None,
        kind: str = "coupling",
        **options: Unpack[FlowOptions],
    ):
        flow = partial(_networked, nsf, hidden_dims, num_layers=num_layers, kind=kind)
        super().__init__(model, flow, **options)


class AutoIAF(AutoFlow):
    """A guide of `num_layers` inverse autoregressive layers over all latents: see `AutoFlow` and `transforms.iaf`.

    The first choice: the best on reference posteriors, funnels among them. Draws, and scores its own draws, in one pass
    a layer; other values take sweeps.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 2,
        hidden_dims: Sequence[int] | None = None,
        **options: Unpack[FlowOptions],
    ):
        flow = partial(_networked, iaf, hidden_dims, num_layers=num_layers)
        super().__init__(model, flow, **options)


class AutoMAF(AutoFlow):
    """A guide of `num_layers` masked autoregressive layers over all latents: see `AutoFlow` and `transforms.maf`.

    Scores any values in one pass a layer; drawing takes sweeps, and so does every training step. `AutoIAF` is the
    orientation for training by the bound; this one is for guides that mostly score.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 2,
        hidden_dims: Sequence[int] | None = None,
        **options: Unpack[FlowOptions],
    ):
        flow = partial(_networked, maf, hidden_dims, num_layers=num_layers)
        super().__init__(model, flow, **options)


class AutoResidual(AutoFlow):
    """A guide of `num_layers` residual layers over all latents: see `AutoFlow` and `transforms.residual`.

    Its density is exact, in training too, by the Jacobian of every layer: D more passes a layer.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_layers: int = 4,
        hidden_dims: Sequence[int] | None = None,
        **options: Unpack[FlowOptions],
    ):
        flow = partial(residual, num_layers=num_layers, hidden_dims=hidden_dims, exact_log_det=True)
        super().__init__(model, flow, **options)
