"""The plate of data that latents are local to, as a model makes it for its arguments, and the rows that it takes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from ..programs import Latent

Program = Callable[..., Any]

# Indices that come out the same so often that chance would do it once in 2³⁰ setups are given, not drawn.
BITS = 30


@dataclass(frozen=True)
class DataPlate:
    """A plate as the model makes it for its arguments: `size` of `full_size` data at `dim`, and what holds within.

    `indices`: which data, where the arguments say so, None where the plate takes all or draws them. `scale` and `mask`:
    what `poutine.scale` and `poutine.mask` in the model put on its latents, the plate's own scale left out.
    """

    name: str
    dim: int
    size: int
    full_size: int
    indices: Tensor | None
    device: str
    scale: float | Tensor
    mask: bool | Tensor | None

    def open(self) -> pyro.plate:
        """The plate again, in a guide: it draws its indices where the model's does."""
        drawn = self.indices is None and self.size < self.full_size
        return pyro.plate(
            self.name,
            self.full_size,
            subsample_size=self.size if drawn else None,
            subsample=self.indices,
            dim=self.dim,
            device=self.device,
        )

    @property
    def takes_all(self) -> bool:
        """Whether these are all data, in their order."""
        return self.indices is None and self.size == self.full_size

    @contextmanager
    def handlers(self) -> Iterator[None]:
        """Scale and mask of the latents."""
        with ExitStack() as stack:
            if isinstance(self.scale, Tensor) or self.scale != 1:
                stack.enter_context(poutine.scale(scale=self.scale))
            if self.mask is not None:
                stack.enter_context(poutine.mask(mask=self.mask))  # type: ignore[arg-type]
            yield

    def rows_of(self, data: Tensor, index: Tensor | None) -> Tensor:
        """The rows that the plate takes: of all data at `index`, or `data` as they are where those are the ones taken."""
        if len(data) == self.full_size:
            return data if self.takes_all or index is None else data[index.to(data.device)]
        if len(data) != self.size:
            raise ValueError(
                f"rows to encode have shape {tuple(data.shape)}: expected {self.full_size} of them, all data of plate "
                f"{self.name!r}, or the {self.size} that are taken"
            )
        return data

    def argument_with_rows(self, args: Any, kwargs: Any) -> int | str:
        """The first tensor among the arguments with a row for each datum, by position or name: of all data, or of those taken."""
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for size in (self.full_size, self.size):
            for key, value in arguments:
                if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
                    return key
        shapes = {key: tuple(x.shape) for key, x in arguments if isinstance(x, Tensor)}
        raise ValueError(
            f"no tensor argument has the {self.full_size} rows of plate {self.name!r}, only {shapes}: say by encoder_inputs "
            "what to encode"
        )

    def is_like(self, plate: SubsampleMessenger) -> bool:
        """Whether a plate that is there already has this one's data."""
        if (plate.size, plate.subsample_size) != (self.full_size, self.size):
            return False
        return self.indices is None or torch.equal(plate.indices.to(self.indices), self.indices)


class _Reached(Exception):
    """The run has come to the latent that it was made for."""

    def __init__(self, msg: Any, plate: SubsampleMessenger, in_order: bool):
        super().__init__()
        self.msg, self.plate, self.in_order = msg, plate, in_order


class _RunTo(Messenger):
    """Ends a run at a latent, and records the latent and its plate."""

    def __init__(self, latent: str, plate: str):
        super().__init__()
        self.latent, self.plate = latent, plate
        self.in_order = False  # whether the plate takes all data, in their order, by default

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.plate and msg["value"] is None:
            self.in_order = msg["fn"].subsample_size in (None, msg["fn"].size)
        if msg["name"] != self.latent:
            return
        # The site itself says how many data there are. Which ones, only the plate does, whose own site
        # poutine.block(expose=...) hides.
        for handler in _PYRO_STACK:
            if isinstance(handler, SubsampleMessenger) and handler.name == self.plate:
                raise _Reached(msg, handler, self.in_order)


@torch.no_grad()
def find_plate(
    model: Program, latent: Latent, name: str, args: Any, kwargs: Any, *, given: bool
) -> DataPlate:
    """The plate `name` that the model makes for these arguments; runs the model up to `latent`, its first.

    `given`: whether the indices of a subsample come with the arguments: see `indices_are_given`.
    """
    plate, msg, in_order = _run_to(model, latent.name, name, args, kwargs)
    if msg["fn"].event_shape != latent.shape[len(latent.shape) - latent.event_dim :]:
        raise ValueError(
            f"latent {latent.name!r} has event shape {tuple(msg['fn'].event_shape)} for these arguments, which is not that "
            "of the arguments the guide was set up on; set up a new guide"
        )
    size, full_size = int(plate.subsample_size), int(plate.size)
    indices: Tensor | None = torch.as_tensor(plate.indices)
    device = str(indices.device)  # type: ignore[union-attr]
    if in_order:  # the values of the indices need not be read, as a compiled step cannot
        given = False
    elif size == full_size:
        given = not torch.equal(indices, torch.arange(size, device=device))  # type: ignore[arg-type]
    scale = msg["scale"] * (size / full_size)
    if not isinstance(scale, Tensor) and math.isclose(scale, 1.0):
        scale = 1.0
    return DataPlate(
        name=name,
        dim=int(plate.dim),  # type: ignore[arg-type]
        size=size,
        full_size=full_size,
        indices=indices if given else None,
        device=device,
        scale=scale,
        mask=msg["mask"],
    )


@torch.no_grad()
def indices_are_given(model: Program, latent: Latent, name: str, args: Any, kwargs: Any) -> bool:
    """Whether the arguments say which data a subsampling plate takes: those are the same in every run, draws are not."""
    plate, *_ = _run_to(model, latent.name, name, args, kwargs)
    if plate.subsample_size == plate.size:
        return False
    first = torch.as_tensor(plate.indices)
    for _ in range(math.ceil(BITS / math.log2(plate.size))):
        again, *_ = _run_to(model, latent.name, name, args, kwargs)
        if not torch.equal(first, torch.as_tensor(again.indices)):
            return False
    return True


def _run_to(
    model: Program, latent: str, plate: str, args: Any, kwargs: Any
) -> tuple[SubsampleMessenger, Any, bool]:
    """The plate, the message of the latent, and whether the plate takes all data in their order by default."""
    try:
        with poutine.block(), _RunTo(latent, plate):
            model(*args, **kwargs)
    except _Reached as reached:
        return reached.plate, reached.msg, reached.in_order
    raise ValueError(
        f"for these arguments the model has no latent {latent!r} in a plate {plate!r}, which the guide was set up for"
    )
