"""Results in files: trained guides and densities, written whole and read without running code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import unwrap

from ..distributions import Density
from ..files import write_atomically
from . import densities, guides
from .content import read_content
from .densities import SavedDensity, density_from, density_to_bytes
from .guides import GUIDES, GuideSpec, SavedGuide, digest, guide_from, guide_to_bytes

__all__ = [
    "GUIDES",
    "GuideSpec",
    "SavedDensity",
    "SavedGuide",
    "density_to_bytes",
    "digest",
    "guide_to_bytes",
    "load",
    "save",
]

FILES = {"guide": "guide.pt", "density": "density.pt"}


def save(
    result: Any,
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    context_columns: Sequence[str] | None = None,
) -> None:
    """Writes a trained density or guide to a file that `load` reads, atomically.

    A density is written with its units and the names of its columns, a guide without its model and data.

    Args:
        result: a density made by `flows`, also within `Dequantized`; a guide that was called; or what `fit_density`
            or `fit` returned.
        path: the file; directories are created.
        columns, context_columns: names for the numbers of rows and contexts; those of `fit_density` by default.

    Raises:
        TypeError: for a result of another kind.
        ValueError: for a density that `flows` did not make, and a guide without parameters.

    Example:
        >>> import pyro_flows_ext as pf
        >>> pf.save(pf.flows.NSF(2), "flow.pt", columns=["x", "y"])  # doctest: +SKIP
        >>> pf.load("flow.pt").density.sample((5,))  # doctest: +SKIP
    """
    part = result
    if not isinstance(result, Density | AutoGuide):
        part = getattr(result, "density", getattr(result, "guide", None))
    if isinstance(part, Density):
        columns = getattr(result, "columns", None) if columns is None else columns
        if context_columns is None:
            context_columns = getattr(result, "context_columns", None)
        content = density_to_bytes(part, columns, context_columns)
    elif isinstance(part, AutoGuide):
        if columns is not None or context_columns is not None:
            raise ValueError("columns, context_columns: expected none for a guide")
        model: Any = unwrap(part.model)  # from the handlers that a guide has around it
        name = getattr(model, "__name__", type(model).__name__)
        content = guide_to_bytes(name, GuideSpec(type(part).__name__), part)
    else:
        raise TypeError(
            f"save: expected a density, a guide or a result of fit or fit_density, got a {type(result).__name__}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def load(path: str | os.PathLike[str]) -> SavedGuide | SavedDensity:
    """Reads a trained guide or density that `save` or the command line wrote.

    Files hold tensors, numbers and names, and reading one runs no code.

    Args:
        path: a file of `save`, or a directory of the command line with `guide.pt` or `density.pt`.

    Returns:
        A `SavedDensity`, whose `density` draws and scores rows in the units of the data, or a `SavedGuide`, whose
        `rebuild(guide, *args, **kwargs)` gives the parameters to a new guide for the model, which is not in the file.

    Raises:
        ValueError: for a file that is missing, cut short, foreign or of another format version, and for a directory
            with both files.

    Example:
        >>> import pyro_flows_ext as pf
        >>> saved = pf.load("pyro-flows-density")  # doctest: +SKIP
        >>> saved.density.sample((5,))  # doctest: +SKIP
    """
    path = Path(path)
    versions = {"guide": guides.VERSION, "density": densities.VERSION}
    if path.is_dir():
        found = [kind for kind, name in FILES.items() if (path / name).exists()]
        if len(found) != 1:
            problem = "holds a guide and a density: name one of them" if found else "holds neither"
            raise ValueError(f"{str(path)!r}: expected {' or '.join(FILES.values())}; it {problem}")
        path = path / FILES[found[0]]
    content = read_content(path, versions)
    read = guide_from if content["format"].endswith(" guide") else density_from
    return read(path, content)
