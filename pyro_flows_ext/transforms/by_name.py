"""Stacks of layers by name, for densities and guides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import FlowTransform
from .planar import Planar
from .presets import circular_nsf, glow_vector, iaf, maf, nice, nsf, realnvp, residual
from .radial import Radial
from .sylvester import sylvester


@dataclass(frozen=True)
class Preset:
    """A flow by name, for densities and guides.

    Attributes:
        make: `make(D, num_layers=K, context_dim=C, **options)` returns the `FlowTransform` from base to data.
        num_layers: K of a density.
        guide_layers: K of a guide, whose gradients are noisier than those of a density.
        description: of its layers.
        is_pushing: whether the cheap pass of `make` is the one from base to data; a density then uses the inverse
            orientation, so that training, which scores data, takes it.
        guide_options: further options of a guide.
        is_circular: whether the numbers are angles in [-π, π), which no guide has.
    """

    make: Callable[..., FlowTransform]
    num_layers: int
    guide_layers: int
    description: str
    is_pushing: bool = False
    guide_options: Mapping[str, Any] = field(default_factory=dict)
    is_circular: bool = False


PRESETS = {
    "nsf": Preset(nsf, 4, 4, "spline couplings (Durkan et al. 2019)"),
    "circular-nsf": Preset(
        circular_nsf, 4, 4, "spline couplings of angles (Rezende et al. 2020)", is_circular=True
    ),
    "maf": Preset(
        maf,
        5,
        2,
        "affine autoregressive layers (Papamakarios et al. 2017); draws variable by variable",
    ),
    "iaf": Preset(
        iaf, 2, 2, "inverse autoregressive layers (Kingma et al. 2016); scores variable by variable"
    ),
    "realnvp": Preset(realnvp, 8, 8, "affine couplings (Dinh et al. 2017)"),
    "nice": Preset(nice, 4, 4, "additive couplings (Dinh et al. 2014)"),
    "glow-vector": Preset(
        glow_vector, 8, 8, "affine couplings and linear layers (Kingma & Dhariwal 2018)"
    ),
    "residual": Preset(
        residual,
        8,
        4,
        "contractive residual networks (Chen et al. 2019)",
        is_pushing=True,
        # Guides need the exact log-det in training too.
        guide_options={"exact_log_det": True},
    ),
    "planar": Preset(Planar, 16, 16, "planar layers (Rezende & Mohamed 2015)", is_pushing=True),
    "radial": Preset(Radial, 16, 16, "radial layers (Rezende & Mohamed 2015)"),
    "sylvester": Preset(
        sylvester, 8, 4, "Sylvester layers (van den Berg et al. 2018)", is_pushing=True
    ),
}
