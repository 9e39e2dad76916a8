"""Trained densities in a file: how they were made, their parameters and units, names of columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributions import Density, Dequantized
from ..flows import Recipe, make
from .content import are_tensors, misfit, state_of, to_bytes

KIND, VERSION = "density", 2


@dataclass(frozen=True)
class SavedDensity:
    """A trained density as a file has it.

    Attributes:
        density: in eval mode, in the units of the data.
        columns: a name for each number of a row, or None.
        context_columns: a name for each number of a context, or None.
        target: the name of the data, or None.
    """

    density: Density
    columns: tuple[str, ...] | None = None
    context_columns: tuple[str, ...] | None = None
    target: str | None = None


def density_to_bytes(
    density: Density,
    columns: Sequence[str] | None = None,
    context_columns: Sequence[str] | None = None,
    target: str | None = None,
) -> bytes:
    """The content of a file for a density of `flows`, or such a one within `Dequantized`.

    Raises:
        ValueError: the density was made in another way, or changed since, so that a file would not bring it back.
    """
    made = _made(density)
    state = state_of(density)
    try:
        _like(_rebuilt(made), state)
    except RuntimeError as error:
        raise ValueError(
            f"density: expected one as {made[-1]['name']} makes it, got other parameters; save density.state_dict() by "
            "torch.save, and load it into a density that is made in the same way"
        ) from error
    content = {
        "made": made,
        "columns": None if columns is None else list(columns),
        "context_columns": None if context_columns is None else list(context_columns),
        "target": target,
        "state": state,
    }
    return to_bytes(KIND, VERSION, content)


def density_from(path: str | os.PathLike[str], content: Mapping[str, Any]) -> SavedDensity:
    """The density of a file's content. Raises `ValueError` where its entries do not fit."""
    names = [content.get("columns"), content.get("context_columns")]
    if not (
        all(value is None or _are_strings(value) for value in names)
        and isinstance(content.get("target"), str | None)
        and are_tensors(content.get("state"))
        and _is_made(content.get("made"))
    ):
        raise misfit(path, KIND)
    try:
        density = _like(_rebuilt(content["made"]), content["state"])
    except (RuntimeError, ValueError, TypeError) as error:
        raise misfit(path, KIND) from error
    columns, context_columns = (None if value is None else tuple(value) for value in names)
    return SavedDensity(density.eval(), columns, context_columns, content.get("target"))


def _made(density: Density) -> list[dict[str, Any]]:
    """How a density was made: the arguments of `Dequantized`, if it is one, and a recipe."""
    if isinstance(density, Dequantized):
        alpha = None if density.preprocess is None else density.preprocess.alpha
        arguments = {
            "kind": density.kind,
            "num_levels": density.num_levels,
            "logit_alpha": alpha,
            "hidden_dims": list(density.hidden_dims),
        }
        return [{"name": "Dequantized", "arguments": arguments}, *_made(density.flow)]
    recipe = getattr(density, "recipe", None)
    if recipe is None or recipe.unsaved:
        unsaved = f" with {', '.join(recipe.unsaved)} given" if recipe is not None else ""
        raise ValueError(
            f"density: expected one that a function of flows made from numbers and names, got a {type(density).__name__}"
            f"{unsaved}; save density.state_dict() by torch.save, and load it into a density that is made in the same way"
        )
    if getattr(density, "context", None) is not None or density.batch_shape:
        raise ValueError(
            f"density: expected one of batch shape () that is not conditioned, got batch shape {tuple(density.batch_shape)}; "
            "save the density that condition or expand was called on"
        )
    return [asdict(recipe)]


def _rebuilt(made: Sequence[Mapping[str, Any]]) -> Density:
    """The density that was made so, not trained; the global generators stay as they are."""
    *outer, inner = made
    with torch.random.fork_rng(devices=[]):
        density = make(Recipe(inner["name"], inner["arguments"]))
        for part in outer:
            density = Dequantized(density, **part["arguments"])
    return density


def _like(density: Density, state: Mapping[str, Tensor]) -> Density:
    """The density in the dtype of a state, which it gets."""
    floats = [value.dtype for value in state.values() if value.is_floating_point()]
    density = density.to(floats[0]) if floats else density
    density.load_state_dict(dict(state))
    return density


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_made(made: Any) -> bool:
    """Whether these are the entries of `_made`: a file may hold anything."""
    return (
        isinstance(made, list)
        and 1 <= len(made) <= 2
        and all(
            isinstance(part, dict)
            and isinstance(part.get("name"), str)
            and isinstance(part.get("arguments"), dict)
            and all(isinstance(key, str) for key in part["arguments"])
            for part in made
        )
        and all(part["name"] == "Dequantized" for part in made[:-1])
    )
