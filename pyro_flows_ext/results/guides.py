"""Trained guides in a file: names and parameters, without the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from ..guides import AutoIAF, AutoNSF, AutoPlanar, AutoRadial, AutoRealNVP, AutoSylvester
from .content import are_tensors, misfit, state_of, to_bytes

KIND, VERSION = "guide", 2


@dataclass(frozen=True)
class GuideKind:
    """A guide by name; `num_layers` is its default number of layers, None where it has none."""

    factory: Callable[..., AutoGuide]
    num_layers: int | None
    description: str


GUIDES = {
    "iaf": GuideKind(
        AutoIAF, 2, "inverse autoregressive flow (Kingma et al. 2016): the first choice"
    ),
    "realnvp": GuideKind(AutoRealNVP, 8, "affine couplings (Dinh et al. 2017)"),
    "nsf": GuideKind(AutoNSF, 4, "spline couplings (Durkan et al. 2019)"),
    "planar": GuideKind(AutoPlanar, 16, "planar flow (Rezende & Mohamed 2015)"),
    "radial": GuideKind(AutoRadial, 16, "radial flow (Rezende & Mohamed 2015)"),
    "sylvester": GuideKind(AutoSylvester, 4, "Sylvester flow (van den Berg et al. 2018)"),
    "normal": GuideKind(
        AutoNormal, None, "independent normals, for comparison (Pyro's AutoNormal)"
    ),
    "multivariate-normal": GuideKind(
        AutoMultivariateNormal, None, "one full-rank normal, for comparison (Pyro's)"
    ),
}


@dataclass(frozen=True)
class GuideSpec:
    """What it takes to build a guide for a model: its kind and its number of layers."""

    kind: str
    num_layers: int | None = None

    def build(self, model: Callable[..., Any]) -> AutoGuide:
        """The guide, without parameters yet. Raises `ValueError` for an unknown kind and impossible options."""
        if self.kind not in GUIDES:
            raise ValueError(f"no guide {self.kind!r}: expected one of {', '.join(GUIDES)}")
        kind = GUIDES[self.kind]
        if kind.num_layers is None:
            if self.num_layers is not None:
                raise ValueError(f"the guide {self.kind!r} has no layers: leave num_layers out")
            return kind.factory(model)
        return kind.factory(model, self.num_layers or kind.num_layers)

    @property
    def depth(self) -> int | None:
        """The number of layers, by default that of the kind; None for guides without layers."""
        return self.num_layers or GUIDES[self.kind].num_layers


@dataclass(frozen=True)
class SavedGuide:
    """A trained guide as a file has it. The model is not part of it; neither are the data.

    `target`: the name of the model. `spec`: what the guide is made of. `state`: its parameters. `data_file`: where the
    data came from, None for those of a built-in model. `data_digest`: `digest` of the data.
    """

    target: str
    spec: GuideSpec
    state: Mapping[str, Tensor]
    data_file: str | None
    data_digest: str

    def rebuild(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> AutoGuide:
        """The trained guide for a model.

        Args:
            model: the model that the guide was fitted to.
            args: its arguments, and
            kwargs: its keyword arguments, as in the fit.

        Raises:
            ValueError: the model has other latents than the guide was fitted to.
        """
        guide = self.spec.build(model)
        # In a store of its own: another guide may have left parameters under the same names.
        with torch.no_grad(), pyro.poutine.block(), pyro.get_param_store().scope():
            guide(*args, **kwargs)
        try:
            guide.load_state_dict(dict(self.state))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the guide was fitted to a model with other latents than {self.target!r} has now"
            ) from error
        return guide


def guide_to_bytes(
    target: str,
    spec: GuideSpec,
    guide: AutoGuide,
    data: Mapping[str, Tensor],
    data_file: str | None = None,
) -> bytes:
    """The content of a file for a trained guide; of the data, only where they are and a digest."""
    content = {
        "target": target,
        "guide": {"kind": spec.kind, "num_layers": spec.depth},
        "state": state_of(guide),
        "data": {"file": data_file, "digest": digest(data)},
    }
    return to_bytes(KIND, VERSION, content)


def guide_from(path: str | os.PathLike[str], content: Mapping[str, Any]) -> SavedGuide:
    """The guide of a file's content. Raises `ValueError` where its entries do not fit."""
    guide, data = content.get("guide"), content.get("data")
    if not (
        isinstance(content.get("target"), str)
        and isinstance(guide, dict)
        and guide.get("kind") in list(GUIDES)
        and isinstance(guide.get("num_layers"), int | None)
        and are_tensors(content.get("state"))
        and isinstance(data, dict)
        and isinstance(data.get("file"), str | None)
        and isinstance(data.get("digest"), str)
    ):
        raise misfit(path, KIND)
    spec = GuideSpec(guide["kind"], guide["num_layers"])
    return SavedGuide(content["target"], spec, content["state"], data["file"], data["digest"])


def digest(data: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(data):
        value = data[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()
