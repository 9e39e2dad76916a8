"""Results in files: trained guides and densities, written whole and read without running code."""

from __future__ import annotations

import os
from pathlib import Path

from . import densities, guides
from .content import read_content
from .densities import DensitySpec, SavedDensity, density_from, density_to_bytes
from .guides import GuideSpec, SavedGuide, digest, guide_from, guide_to_bytes

__all__ = [
    "DensitySpec",
    "GuideSpec",
    "SavedDensity",
    "SavedGuide",
    "density_to_bytes",
    "digest",
    "guide_to_bytes",
    "load",
]

FILES = {"guide": "guide.pt", "density": "density.pt"}


def load(path: str | os.PathLike[str]) -> SavedGuide | SavedDensity:
    """Reads a trained guide or density that the command line wrote.

    Files hold tensors, numbers and names, and reading one runs no code.

    Args:
        path: `guide.pt`, `density.pt`, or a directory with one of the two.

    Returns:
        A `SavedDensity`, whose `density` draws and scores rows in the units of the data, or a `SavedGuide`, whose
        `rebuild(model, *args, **kwargs)` makes the guide for the model, which is not part of the file.

    Raises:
        ValueError: for a file that is missing, cut short, foreign or of another format version, and for a directory
            with both files.

    Example:
        >>> from pyro_flows_ext.results import load
        >>> saved = load("pyro-flows-density")  # doctest: +SKIP
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
