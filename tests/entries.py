"""What an entry of the catalogue of transforms is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

CONTEXT_DIM = 2


@dataclass(frozen=True)
class Entry:
    """`make(D)` is the transform, of events `(D,)` unless `event_shape` says otherwise; `dim` is the D to test at.

    `covers`: the public names of `pyro_flows_ext.transforms` that the entry stands for. `scale`: of the perturbation.
    `context_dim`: that of the transform unless given.
    """

    make: Callable[[int], nn.Module]
    covers: Sequence[str]
    dim: int = 3
    context_dim: int | None = None
    event_shape: tuple[int, ...] | None = None
    scale: float = 0.7

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
        return {
            "context_dim": self.context_dim,
            "event_shape": self.event_shape,
            "scale": self.scale,
        }
