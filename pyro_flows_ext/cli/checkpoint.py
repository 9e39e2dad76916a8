"""Trained guides in a file: `guide.pt` holds tensors, numbers and names, and loading it runs no code it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from ..guides import AutoIAF, AutoNSF, AutoPlanar, AutoRadial, AutoRealNVP, AutoSylvester

FORMAT = "pyro_flows_ext guide"
VERSION = 1


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


@dataclass(frozen=True)
class Checkpoint:
    """The content of a `guide.pt`: names, the guide's parameters, and the data it was fitted to."""

    target: str
    guide: GuideSpec
    state: Mapping[str, Tensor]
    data: dict[str, Tensor]


def save_guide(path: Path, target: str, spec: GuideSpec, guide: AutoGuide, data: dict) -> None:
    """Writes a trained guide, with the data that it takes to call the model again."""
    layers = spec.num_layers or GUIDES[spec.kind].num_layers
    torch.save(
        {
            "format": FORMAT,
            "version": VERSION,
            "target": target,
            "guide": {"kind": spec.kind, "num_layers": layers},
            "state": {name: value.detach().cpu() for name, value in guide.state_dict().items()},
            "data": data,
        },
        path,
    )


def read_content(path: Path, form: str, version: int, command: str) -> dict[str, Any]:
    """A dict of this form and version that `torch.save` wrote; nothing but tensors, numbers and strings is ever read.

    `form` ends in the name of what the file holds, and `command` writes it. Raises `ValueError` when the file is
    missing, cut short, or something else.
    """
    noun = form.split()[-1]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no file {str(path)!r}: run pyro-flows {command} first") from None
    except OSError as error:
        raise ValueError(f"{str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # torch raises a dozen kinds for bytes that make no sense
        raise ValueError(f"{str(path)!r} is not a {noun}, or only half of one") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"{str(path)!r} is not a {noun} written by pyro-flows")
    if content.get("version") != version:
        raise ValueError(
            f"{str(path)!r} has format version {content.get('version')!r}, and this release reads {version}: "
            f"{command} again, or use the release that wrote it"
        )
    return content


def read_guide(path: Path) -> Checkpoint:
    """The content of a file by `save_guide`. Raises `ValueError` as `read_content` does."""
    content = read_content(path, FORMAT, VERSION, "fit")
    guide = content.get("guide")
    well_formed = (
        isinstance(content.get("target"), str)
        and isinstance(guide, dict)
        and guide.get("kind") in list(GUIDES)
        and isinstance(guide.get("num_layers"), int | None)
        and all(are_tensors(content.get(key)) for key in ("state", "data"))
    )
    if not well_formed or not isinstance(guide, dict):
        raise ValueError(
            f"{str(path)!r} is not a guide that pyro-flows wrote: its entries do not fit"
        )
    spec = GuideSpec(guide["kind"], guide["num_layers"])
    return Checkpoint(content["target"], spec, content["state"], content["data"])


def rebuild_guide(checkpoint: Checkpoint, model: Callable[..., Any]) -> AutoGuide:
    """The trained guide for `model`, which must have the latents it was fitted to (`ValueError` otherwise)."""
    guide = checkpoint.guide.build(model)
    with torch.no_grad(), pyro.poutine.block():
        guide(**checkpoint.data)
    try:
        guide.load_state_dict(dict(checkpoint.state))
    except RuntimeError as error:
        raise ValueError(
            f"the guide was fitted to a model with other latents than {checkpoint.target!r} has now"
        ) from error
    return guide


def are_tensors(value: Any) -> bool:
    """Whether this is a dict of tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )
