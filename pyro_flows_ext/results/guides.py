"""Trained guides in a file: names and parameters, without the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from ..guides import AutoFlow
from ..transforms.by_name import PRESETS
from .content import are_tensors, misfit, state_of, to_bytes

KIND, VERSION = "guide", 3


@dataclass(frozen=True)
class GuideKind:
    """A guide by name; `num_layers` is its default number of layers, None where it has none."""

    factory: Callable[..., AutoGuide]
    num_layers: int | None
    description: str


def _flow_guide(name: str, model: Callable[..., Any], num_layers: int) -> AutoGuide:
    preset = PRESETS[name]
    flow = partial(preset.make, num_layers=num_layers, **preset.guide_options)
    return AutoFlow(model, flow)


def _flow_kind(name: str) -> GuideKind:
    preset = PRESETS[name]
    return GuideKind(partial(_flow_guide, name), preset.guide_layers, preset.description)


GUIDES = {
    # The first choice, and the default of the command, comes first.
    **{
        name: _flow_kind(name)
        for name in sorted(PRESETS, key="iaf".__ne__)
        if not PRESETS[name].is_circular
    },
    "normal": GuideKind(
        AutoNormal, None, "independent normals, for comparison (Pyro's AutoNormal)"
    ),
    "multivariate-normal": GuideKind(
        AutoMultivariateNormal, None, "one full-rank normal, for comparison (Pyro's)"
    ),
}


@dataclass(frozen=True)
class GuideSpec:
    """The kind and the number of layers from which a guide for a model is built.

    The kind is one of `GUIDES`, or the name of a class, of which a file holds no more.
    """

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
        if self.kind not in GUIDES:
            return self.num_layers
        return self.num_layers or GUIDES[self.kind].num_layers


@dataclass(frozen=True)
class SavedGuide:
    """A trained guide as a file has it. The model is not part of it; neither are the data.

    Attributes:
        target: the name of the model.
        spec: what the guide is made of.
        state: its parameters.
        data_file: the file of the data, or None.
        data_digest: `digest` of the data, or None where the guide was saved without.
    """

    target: str
    spec: GuideSpec
    state: Mapping[str, Tensor] = field(repr=False)
    data_file: str | None = None
    data_digest: str | None = None

    def rebuild(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> AutoGuide:
        """The trained guide.

        Args:
            model: the model that the guide was fitted to, or a new guide for it, made as the trained one was: needed
                for guides that `save` wrote.
            args: arguments of the model, and
            kwargs: its keyword arguments, as in the fit.

        Raises:
            ValueError: the guide or the latents of the model are others than those of the file.
        """
        is_guide = isinstance(model, AutoGuide)
        if not is_guide and self.spec.kind not in GUIDES:
            raise ValueError(
                f"rebuild: expected a new {self.spec.kind} made as the saved one was, such as {self.spec.kind}(model), got "
                "the model alone"
            )
        guide: Any = model if is_guide else self.spec.build(model)
        # In a store of its own: another guide may have left parameters under the same names.
        with torch.no_grad(), pyro.poutine.block(), pyro.get_param_store().scope():
            guide(*args, **kwargs)
        try:
            guide.load_state_dict(dict(self.state))
        except (RuntimeError, ValueError) as error:
            made = f"a new {self.spec.kind} made as the saved one was, for " if is_guide else ""
            got = f"a {type(guide).__name__} with other parameters" if is_guide else "other latents"
            raise ValueError(
                f"rebuild: expected {made}a model with the latents of {self.target!r}, got {got}"
            ) from error
        return guide


def guide_to_bytes(
    target: str,
    spec: GuideSpec,
    guide: AutoGuide,
    data: Mapping[str, Tensor] | None = None,
    data_file: str | None = None,
) -> bytes:
    """The content of a file for a trained guide; of the data, only where they are and a digest."""
    state = state_of(guide)
    if not state:
        raise ValueError("guide: expected one with parameters, got one that was never called")
    content = {
        "target": target,
        "guide": {"kind": spec.kind, "num_layers": spec.depth},
        "state": state,
        "data": {"file": data_file, "digest": None if data is None else digest(data)},
    }
    return to_bytes(KIND, VERSION, content)


def guide_from(path: str | os.PathLike[str], content: Mapping[str, Any]) -> SavedGuide:
    """The guide of a file's content. Raises `ValueError` where its entries do not fit."""
    guide, data = content.get("guide"), content.get("data")
    if not (
        isinstance(content.get("target"), str)
        and isinstance(guide, dict)
        and isinstance(guide.get("kind"), str)
        and isinstance(guide.get("num_layers"), int | None)
        and are_tensors(content.get("state"))
        and isinstance(data, dict)
        and isinstance(data.get("file"), str | None)
        and isinstance(data.get("digest"), str | None)
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
