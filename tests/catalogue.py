"""Every transform of the package, once in each form: what the tests of the contract run over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import pyro_flows_ext.transforms as T

CONTEXT_DIM = 2


@dataclass(frozen=True)
class Entry:
    """`make(D)` is the transform, of events `(D,)` unless `event_shape` says otherwise; `dim` is the D to test at.

    `covers`: the public names of `pyro_flows_ext.transforms` that the entry stands for.
    """

    make: Callable[[int], nn.Module]
    covers: Sequence[str]
    dim: int = 3
    context_dim: int | None = None
    event_shape: tuple[int, ...] | None = None

    def factory(self, dim: int | None = None) -> Callable[[], nn.Module]:
        """What the contract suite builds from; `dim` in place of the entry's own for what needs a small one."""
        return partial(self.make, self.dim if dim is None else dim)

    @property
    def is_vector(self) -> bool:
        """Whether `dim` may be chosen."""
        return self.event_shape is None

    @property
    def options(self) -> dict:
        """The keywords of the checks."""
        return {"context_dim": self.context_dim, "event_shape": self.event_shape}


def conditional(make: Callable[[int], nn.Module], *covers: str, dim: int = 3) -> Entry:
    return Entry(make, covers, dim=dim, context_dim=CONTEXT_DIM)


def _whitening(dim: int) -> T.Whitening:
    scale_tril = torch.randn(dim, dim).tril(-1) + torch.diag(torch.rand(dim) + 0.5)
    return T.Whitening(torch.randn(dim), scale_tril)


def _compose(dim: int) -> T.ComposeFlow:
    return T.ComposeFlow(
        [T.radial(dim), T.planar(dim).inv, T.ElementwiseAffine(dim), _whitening(dim)]
    )


_HIDDEN = (4,)

CATALOGUE: dict[str, Entry] = {
    # --- plain ---
    "planar": Entry(T.planar, ["planar", "Planar"]),
    "planar-2": Entry(lambda D: T.planar(D, num_transforms=2), ["Planar"]),
    "planar-1d": Entry(T.planar, ["Planar"], dim=1),
    "radial": Entry(T.radial, ["radial", "Radial"]),
    "radial-2": Entry(lambda D: T.radial(D, num_transforms=2), ["Radial"]),
    "radial-1d": Entry(T.radial, ["Radial"], dim=1),
    "sylvester-orthogonal": Entry(T.sylvester, ["sylvester", "OrthogonalSylvester"]),
    "sylvester-householder": Entry(
        lambda D: T.sylvester(D, kind="householder", num_reflections=2), ["HouseholderSylvester"]
    ),
    "sylvester-triangular": Entry(
        lambda D: T.sylvester(D, kind="triangular", num_transforms=2), ["TriangularSylvester"]
    ),
    "sylvester-low-rank": Entry(lambda D: T.sylvester(D, rank=D - 1), ["OrthogonalSylvester"]),
    "sylvester-1d": Entry(T.sylvester, ["OrthogonalSylvester"], dim=1),
    "elementwise-affine": Entry(T.ElementwiseAffine, ["ElementwiseAffine"]),
    "whitening": Entry(_whitening, ["Whitening"]),
    "compose": Entry(_compose, ["ComposeFlow"]),
    # --- the inverse orientation ---
    "planar-inverse": Entry(lambda D: T.planar(D).inv, ["InverseFlow"]),
    "sylvester-inverse": Entry(lambda D: T.sylvester(D).inv, ["InverseFlow"]),
    "compose-inverse": Entry(lambda D: _compose(D).inv, ["InverseFlow"]),
    # --- conditional ---
    "conditional-planar": conditional(
        lambda D: T.conditional_planar(D, CONTEXT_DIM, _HIDDEN, num_transforms=2),
        "conditional_planar",
        "ConditionalPlanar",
    ),
    "conditional-planar-inverse": conditional(
        lambda D: T.conditional_planar(D, CONTEXT_DIM, _HIDDEN).inv, "ConditionalPlanar"
    ),
    "conditional-radial": conditional(
        lambda D: T.conditional_radial(D, CONTEXT_DIM, _HIDDEN, num_transforms=2),
        "conditional_radial",
        "ConditionalRadial",
    ),
    "conditional-sylvester-orthogonal": conditional(
        lambda D: T.conditional_sylvester(D, CONTEXT_DIM, _HIDDEN),
        "conditional_sylvester",
        "ConditionalOrthogonalSylvester",
    ),
    "conditional-sylvester-householder": conditional(
        lambda D: T.conditional_sylvester(D, CONTEXT_DIM, _HIDDEN, kind="householder"),
        "ConditionalHouseholderSylvester",
    ),
    "conditional-sylvester-triangular": conditional(
        lambda D: T.conditional_sylvester(D, CONTEXT_DIM, _HIDDEN, kind="triangular"),
        "ConditionalTriangularSylvester",
    ),
    "conditional-sylvester-low-rank": conditional(
        lambda D: T.ConditionalOrthogonalSylvester(D, CONTEXT_DIM, _HIDDEN, rank=D - 1),
        "ConditionalOrthogonalSylvester",
    ),
    "conditional-flow": conditional(
        lambda D: T.ConditionalFlow(T.ElementwiseAffine(D), CONTEXT_DIM, _HIDDEN),
        "ConditionalFlow",
    ),
}
