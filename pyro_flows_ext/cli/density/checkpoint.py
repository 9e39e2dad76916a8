"""Trained densities in a file: `density.pt` holds tensors, numbers and names, and loading it runs no code it names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...distributions import Density
from ..checkpoint import are_tensors, read_content
from .flows import DEQUANTIZE, FLOWS, DensitySpec

FORMAT = "pyro_flows_ext density"
VERSION = 1


@dataclass(frozen=True)
class SavedDensity:
    """A trained density, the name of its data, and a name for each number of a row."""

    target: str
    columns: tuple[str, ...]
    density: Density


def save_density(
    path: Path, target: str, columns: tuple[str, ...], spec: DensitySpec, density: Density
) -> None:
    """Writes a trained density."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "target": target,
        "columns": list(columns),
        "spec": {**asdict(spec), "event_shape": list(spec.event_shape)},
        "state": {name: value.detach().cpu() for name, value in density.state_dict().items()},
    }
    torch.save(content, path)


def read_density(path: Path) -> SavedDensity:
    """The density of a file by `save_density`, in eval mode. Raises `ValueError` as `read_content` does."""
    content = read_content(path, FORMAT, VERSION, "density")
    columns, spec = content.get("columns"), content.get("spec")
    misfit = f"{str(path)!r} is not a density that pyro-flows wrote: its entries do not fit"
    if not (
        isinstance(content.get("target"), str)
        and isinstance(columns, list)
        and all(isinstance(column, str) for column in columns)
        and are_tensors(content.get("state"))
        and isinstance(spec, dict)
        and _is_spec(spec)
    ):
        raise ValueError(misfit)
    try:
        density = DensitySpec(**{**spec, "event_shape": tuple(spec["event_shape"])}).build()
        density.load_state_dict(content["state"])
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(misfit) from error
    density.eval()
    return SavedDensity(content["target"], tuple(columns), density)


def _is_spec(spec: dict[str, Any]) -> bool:
    """Whether these are the fields of a `DensitySpec`: what is in a file may be anything."""
    return (
        spec.keys() == DensitySpec.__dataclass_fields__.keys()
        and spec["flow"] in list(FLOWS)
        and isinstance(spec["event_shape"], list)
        and len(spec["event_shape"]) in (1, 3)
        and all(isinstance(size, int) for size in spec["event_shape"])
        and isinstance(spec["num_layers"], int | None)
        and spec["dequantize"] in DEQUANTIZE
        and isinstance(spec["num_levels"], int | None)
    )
