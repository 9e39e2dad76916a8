"""Flow densities by name, in the units of the data, and trained ones in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .. import transforms as T
from ..distributions import (
    ContinuouslyIndexedFlow,
    Density,
    Dequantized,
    FlowDistribution,
    FlowVAE,
    MultiScaleFlow,
    NestedDropoutFlow,
    glow,
    realnvp_image,
    rq_nsf_image,
)
from .content import are_tensors, misfit, state_of, to_bytes

KIND, VERSION = "density", 1
DEQUANTIZE = ("no", "uniform", "variational")


@dataclass(frozen=True)
class FlowKind:
    """A density by name: `make(D, K)` of vectors, `make((C, H, W), K)` of images; K layers or steps, None for none."""

    make: Callable[[Any, Any], Density]
    num_layers: int | None
    description: str
    of_images: bool = False


@dataclass(frozen=True)
class DensitySpec:
    """What it takes to build a density: kind, layers, event, and the noise for whole numbers 0 ... `num_levels` - 1."""

    flow: str
    event_shape: tuple[int, ...]
    num_layers: int | None = None
    dequantize: str = "no"
    num_levels: int | None = None

    def build(self, train: Tensor | None = None) -> Density:
        """The density, standardised and started by `train` `(N, *event_shape)`; without, to load parameters into.

        Raises `ValueError` for unknown names and options that do not go together.
        """
        if self.flow not in FLOWS:
            raise ValueError(f"no flow {self.flow!r}: expected one of {', '.join(FLOWS)}")
        kind = FLOWS[self.flow]
        self._check(kind)
        event = self.event_shape if kind.of_images else self.event_shape[0]
        inner = kind.make(event, self.num_layers or kind.num_layers)
        standardize = self.standardize(train)
        if train is not None and isinstance(inner, MultiScaleFlow):
            inner.initialize(standardize.forward_and_ladj(self.continuous(train))[0])
        return self.wrap(inner, standardize)

    @property
    def depth(self) -> int | None:
        """The number of layers, by default that of the flow; None for flows without."""
        return self.num_layers or FLOWS[self.flow].num_layers

    @property
    def dequantizes(self) -> bool:
        """Whether noise is added to the data."""
        return self.num_levels is not None and self.dequantize != "no"

    def continuous(self, rows: Tensor) -> Tensor:
        """What is standardised: the rows, or whole numbers with noise, brought to [0, 1)."""
        if self.num_levels is None or self.dequantize == "no":
            return rows
        return (rows + torch.rand_like(rows)) / self.num_levels

    def standardize(self, train: Tensor | None) -> T.Standardize:
        """By the moments of these rows: of each column, and of each channel of an image."""
        dims = len(self.event_shape)
        if train is not None:
            return T.Standardize.from_data(self.continuous(train), dims, per_channel=dims == 3)
        ones = torch.ones(self.event_shape[:1] + (1,) * (dims - 1))
        return T.Standardize(torch.zeros_like(ones), ones, dims)

    def wrap(self, inner: Density, standardize: T.Standardize) -> Density:
        """The density of the data by one of what is standardised, and before that dequantized."""
        inner.standardize(standardize.loc, standardize.scale)
        if not self.dequantizes:
            return inner
        # Without logits, which would pull the ends of the range, where most pixels are, far out.
        return Dequantized(
            inner, self.dequantize, num_levels=self.num_levels or 0, logit_alpha=None
        )

    def _check(self, kind: FlowKind) -> None:
        if kind.num_layers is None and self.num_layers is not None:
            raise ValueError(f"the flow {self.flow!r} has one layer: leave --num-layers out")
        if kind.of_images != (len(self.event_shape) == 3):
            shape = "images (C, H, W)" if kind.of_images else "vectors (D)"
            raise ValueError(
                f"the flow {self.flow!r} is of {shape}, and a row here is of shape {self.event_shape}"
            )


# --- the kinds ---


def normal(size: int) -> dist.TorchDistribution:
    """N(0, I) on vectors of this size."""
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def _exact(make: Callable[[int, int], Any]) -> Callable[[Any, Any], Density]:
    return lambda D, K: FlowDistribution(normal(D), make(D, K))


def _indexed(make: Callable[[int, int], Any]) -> Callable[[Any, Any], Density]:
    return lambda D, K: ContinuouslyIndexedFlow(normal(D), make(D, K))


def _nested(make: Callable[[int, Any], Any]) -> Callable[[Any, Any], Density]:
    return lambda D, K: NestedDropoutFlow(normal(D), make(D, K))


def _vae(D: int, K: int) -> Density:
    return FlowVAE(T.nsf(D, num_layers=K), D, max(1, min(8, D // 2)))


FLOWS = {
    "nsf": FlowKind(
        _exact(lambda D, K: T.nsf(D, num_layers=K)), 4, "spline couplings (Durkan et al. 2019)"
    ),
    "nsf-ar": FlowKind(
        _exact(lambda D, K: T.nsf(D, num_layers=K, kind="autoregressive")),
        3,
        "autoregressive splines (Durkan et al. 2019); draws slowly",
    ),
    "realnvp": FlowKind(
        _exact(lambda D, K: T.realnvp(D, num_layers=K)),
        8,
        "affine couplings (Dinh et al. 2017)",
    ),
    "glow-vector": FlowKind(
        _exact(lambda D, K: T.glow_vector(D, num_layers=K)),
        8,
        "affine couplings and linear layers (Kingma & Dhariwal 2018)",
    ),
    "maf": FlowKind(
        _exact(lambda D, K: T.maf(D, num_layers=K)),
        5,
        "affine autoregressive layers (Papamakarios et al. 2017); draws slowly",
    ),
    # Their forward pass is the fast one, and goes from the data to the base here.
    "residual": FlowKind(
        _exact(lambda D, K: T.residual(D, num_layers=K).inv),
        8,
        "contractive residual networks (Chen et al. 2019)",
    ),
    "planar": FlowKind(
        _exact(lambda D, K: T.planar(D, num_layers=K).inv),
        16,
        "planar layers (Rezende & Mohamed 2015)",
    ),
    "sylvester": FlowKind(
        _exact(lambda D, K: T.sylvester(D, num_layers=K).inv),
        8,
        "Sylvester layers (van den Berg et al. 2018)",
    ),
    "cif-maf": FlowKind(
        _indexed(lambda D, K: T.maf(D, num_layers=K)),
        5,
        "maf, continuously indexed (Cornish et al. 2020); a bound",
    ),
    "cif-nsf": FlowKind(
        _indexed(lambda D, K: T.nsf(D, num_layers=K, linear=False)),
        4,
        "nsf, continuously indexed (Cornish et al. 2020); a bound",
    ),
    "nested-qr": FlowKind(
        _nested(lambda D, K: T.QRLinear(D)),
        None,
        "one linear layer with ordered latents (Bekasov & Murray 2020)",
    ),
    "nested-lu": FlowKind(
        _nested(lambda D, K: T.LULinear(D)), None, "the same, by an LU decomposition"
    ),
    "nested-nsf": FlowKind(
        _nested(lambda D, K: T.nsf(D, num_layers=K)),
        4,
        "nsf with ordered latents (Bekasov & Murray 2020)",
    ),
    "flow-vae": FlowKind(_vae, 4, "nsf over a small VAE, trained first (Das et al. 2019); a bound"),
    "glow": FlowKind(
        lambda shape, K: glow(shape, num_layers=K), 4, "Glow, of images, K steps a level", True
    ),
    "realnvp-image": FlowKind(
        lambda shape, K: realnvp_image(shape, num_layers=K),
        4,
        "RealNVP, of images, K steps a level",
        True,
    ),
    "rq-nsf-image": FlowKind(
        lambda shape, K: rq_nsf_image(shape, num_layers=K),
        4,
        "RQ-NSF (C), of images, K steps a level",
        True,
    ),
}


# --- files ---


@dataclass(frozen=True)
class SavedDensity:
    """A trained density in eval mode, the name of its data, and a name for each number of a row."""

    target: str
    columns: tuple[str, ...]
    spec: DensitySpec
    density: Density


def density_to_bytes(
    target: str, columns: tuple[str, ...], spec: DensitySpec, density: Density
) -> bytes:
    """The content of a file for a trained density."""
    content = {
        "target": target,
        "columns": list(columns),
        "spec": {**asdict(spec), "event_shape": list(spec.event_shape)},
        "state": state_of(density),
    }
    return to_bytes(KIND, VERSION, content)


def density_from(path: str | os.PathLike[str], content: Mapping[str, Any]) -> SavedDensity:
    """The density of a file's content. Raises `ValueError` where its entries do not fit."""
    columns, fields = content.get("columns"), content.get("spec")
    if not (
        isinstance(content.get("target"), str)
        and isinstance(columns, list)
        and all(isinstance(column, str) for column in columns)
        and are_tensors(content.get("state"))
        and isinstance(fields, dict)
        and _is_spec(fields)
    ):
        raise misfit(path, KIND)
    try:
        spec = DensitySpec(**{**fields, "event_shape": tuple(fields["event_shape"])})
        density = spec.build()
        density.load_state_dict(content["state"])
    except (RuntimeError, ValueError, TypeError) as error:
        raise misfit(path, KIND) from error
    density.eval()
    return SavedDensity(content["target"], tuple(columns), spec, density)


def _is_spec(fields: dict[str, Any]) -> bool:
    """Whether these are the fields of a `DensitySpec`: a file may hold anything."""
    return (
        fields.keys() == DensitySpec.__dataclass_fields__.keys()
        and fields["flow"] in list(FLOWS)
        and isinstance(fields["event_shape"], list)
        and len(fields["event_shape"]) in (1, 3)
        and all(isinstance(size, int) for size in fields["event_shape"])
        and isinstance(fields["num_layers"], int | None)
        and fields["dequantize"] in DEQUANTIZE
        and isinstance(fields["num_levels"], int | None)
    )
