"""Flow guides by name: one line in place of `AutoNormal`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from typing_extensions import Unpack

from ..transforms import iaf, maf, nsf, planar, radial, realnvp, residual, sylvester
from .base import AutoFlow, FlowOptions


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
        flow = partial(nsf, num_layers=num_layers, hidden_dims=hidden_dims, kind=kind)
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
        flow = partial(iaf, num_layers=num_layers, hidden_dims=hidden_dims)
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
        flow = partial(maf, num_layers=num_layers, hidden_dims=hidden_dims)
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
