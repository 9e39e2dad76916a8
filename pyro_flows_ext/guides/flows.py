"""Flow guides by name: one line in place of `AutoNormal`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from typing_extensions import Unpack

from ..transforms import planar, radial, sylvester
from .base import AutoFlow, GuideOptions


class AutoPlanar(AutoFlow):
    """A guide of `num_transforms` planar layers over all latents: see `AutoFlow` and `transforms.Planar`.

    O(KD) parameters: for many latents with few, strong dependencies.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_transforms: int = 16,
        **options: Unpack[GuideOptions],
    ):
        super().__init__(model, partial(planar, num_transforms=num_transforms), **options)


class AutoRadial(AutoFlow):
    """A guide of `num_transforms` radial layers over all latents: see `AutoFlow` and `transforms.Radial`.

    Each layer widens or narrows the density around a point; it cannot turn or correlate, so the gain over a
    mean-field guide is small beyond a few dimensions.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_transforms: int = 16,
        **options: Unpack[GuideOptions],
    ):
        super().__init__(model, partial(radial, num_transforms=num_transforms), **options)


class AutoSylvester(AutoFlow):
    """A guide of `num_transforms` Sylvester layers over all latents: see `AutoFlow` and `transforms.sylvester`.

    `kind` is "orthogonal", "householder" or "triangular"; `rank=None` is full rank, O(KD²) parameters. The first
    choice up to some hundred latents; a lower rank beyond.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        num_transforms: int = 4,
        kind: str = "orthogonal",
        rank: int | None = None,
        **options: Unpack[GuideOptions],
    ):
        flow = partial(sylvester, num_transforms=num_transforms, kind=kind, rank=rank)
        super().__init__(model, flow, **options)
