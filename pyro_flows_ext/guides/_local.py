"""The latents that are local to a plate of data, and the plate that a model makes for its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions.constraints import Constraint

from ..distributions.tensors import map_tensors
from ..programs import (
    Latent,
    SparseSubsample,
    check_inside,
    check_log_prob,
    support_of,
    tensors_of,
)

Program = Callable[..., Any]

# Indices are taken for given, not drawn, if equal in so many runs that drawn ones would be so once in 2³⁰ setups.
BITS = 30


@dataclass(frozen=True)
class LocalLatent(Latent):
    """A latent of one datum; its shape begins with the dimensions of plates within the datum, `inner`: (name, size, dim)."""

    inner: tuple[tuple[str, int, int], ...]


def read_latents(trace: Trace, plate: str | None) -> tuple[str, list[LocalLatent], Tensor]:
    """The data plate of a model run, its latents, and the mean over the data of their values, unconstrained `(D)`.

    `plate`: the data plate's name; None if the latents have a single plate in common. Raises `ValueError` for latents
    that no amortized guide can represent.
    """
    sites: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    frame = _data_frame(sites, plate)
    latents, means = [], []
    first = next(iter(sites.values()))
    for name, site in sites.items():
        _check_site(name, site, frame)
        for key in ("scale", "mask"):
            if not _equal(site[key], first[key]):
                raise ValueError(
                    f"latents {first['name']!r} and {name!r}: expected all latents within the same poutine.{key}, since they have "
                    f"one joint density in the guide, got a {key} of their own each"
                )
        fn, value = site["fn"], site["value"].detach()
        support = _datum_support(name, fn, frame.dim)
        unconstrained = check_inside(name, support, value)
        check_log_prob(name, fn, value)
        inner = [f for f in site["cond_indep_stack"] if f.name != frame.name]
        latents.append(
            LocalLatent(
                name=name,
                support=support,
                event_dim=fn.event_dim,
                shape=value.shape[1:],
                unconstrained_shape=unconstrained.shape[1:],
                inner=tuple((f.name, f.size, f.dim) for f in inner),
                inside=value[0].clone(),
            )
        )
        means.append(unconstrained.mean(0).flatten())
    return frame.name, latents, torch.cat(means)


def check_same(known: Sequence[LocalLatent], new: Sequence[LocalLatent]) -> None:
    """Raises `ValueError` unless two runs of a model have the same latents, in shape and support."""

    def outline(latents: Sequence[LocalLatent]) -> dict[str, Any]:
        return {latent.name: (tuple(latent.shape), latent.inner) for latent in latents}

    if outline(known) != outline(new):
        raise ValueError(
            f"for these arguments the latents of a datum are {outline(new)} (shape, inner plates); the guide was set up "
            f"for {outline(known)}. Set up a new guide on these arguments"
        )
    for old, latent in zip(known, new, strict=True):
        a, b = tensors_of(old.support), tensors_of(latent.support)
        if len(a) != len(b) or not all(map(_equal, a, b)):
            raise ValueError(
                f"latent {latent.name!r} has a support that changes from run to run ({old.support}, then {latent.support}); "
                "expected one that depends on neither data nor latents: sample on a fixed support, and transform"
            )


def _data_frame(sites: dict[str, Any], plate: str | None) -> Any:
    """The frame of the plate that all of these sites are in."""
    if not sites:
        raise ValueError("model: expected latents in a plate of data, got a model without latents")
    stacks = {name: site["cond_indep_stack"] for name, site in sites.items()}
    frames = {f.name: f for stack in stacks.values() for f in stack}
    for f in frames.values():
        if not f.vectorized or f.size < 0:
            raise ValueError(f"plate {f.name!r}: expected one with a size, used by `with`")
    if plate is not None and plate not in frames:
        raise ValueError(
            f"plate: expected a plate that has latents in it, one of {sorted(frames)}; got {plate!r}"
        )
    outside = [
        name
        for name, stack in stacks.items()
        if (plate not in {f.name for f in stack} if plate else not stack)
    ]
    if outside:
        where = f"outside of plate {plate!r}" if plate else "global, in no plate"
        raise ValueError(
            f"latents {outside} are {where}: give this guide poutine.block(model, hide={outside}), and another guide "
            f"poutine.block(model, expose={outside}); AutoGuideList joins the two"
        )
    common = set.intersection(*({f.name for f in stack} for stack in stacks.values()))
    names = [plate] if plate else sorted(common)
    if not names:
        of = {name: [f.name for f in stack] for name, stack in stacks.items()}
        raise ValueError(
            f"latents have no plate in common ({of}): expose the latents of one plate to each guide, with poutine.block"
        )
    if len(names) > 1:
        raise ValueError(f"latents lie in the plates {names}: name the plate of the data by plate=")
    return frames[names[0]]


def _check_site(name: str, site: Any, frame: Any) -> None:
    fn = site["fn"]
    for f in site["cond_indep_stack"]:
        if f.dim < frame.dim:
            raise ValueError(
                f"latent {name!r} is in plate {f.name!r} at dim {f.dim}, left of the data plate {frame.name!r} at dim "
                f"{frame.dim}: expected plates within a datum on its right"
            )
        if f.name != frame.name and f.full_size not in (None, f.size):
            raise ValueError(
                f"latent {name!r} is in plate {f.name!r}, which subsamples {f.size} of {f.full_size} within a datum: "
                f"expected no other subsampled plate than {frame.name!r}"
            )
    if len(fn.batch_shape) != -frame.dim:
        raise ValueError(
            f"latent {name!r} has batch shape {tuple(fn.batch_shape)}, more dimensions than its plates: declare each "
            "by pyro.plate, or make it an event dimension by .to_event"
        )
    mask, scale = site["mask"], site["scale"]
    for key, t in (("mask", mask), ("scale", scale)):
        inner = t.shape[max(0, t.dim() + frame.dim + 1) :] if isinstance(t, Tensor) else ()
        if any(size > 1 for size in inner):
            raise ValueError(
                f"latent {name!r} has a {key} of shape {tuple(t.shape)}, which differs within a datum: expected one value "
                f"for each datum of plate {frame.name!r}"
            )


def _datum_support(name: str, fn: Any, dim: int) -> Constraint:
    """The support without its dimension of data, along which it must not change."""
    axis = dim - fn.event_dim

    def first(t: Tensor) -> Tensor:
        if t.dim() < -axis:
            return t.detach()
        one = t.detach().narrow(axis, 0, 1)
        if not bool((t == one).all()):
            raise ValueError(
                f"latent {name!r} has a support that differs between data ({support_of(name, fn)}): expected one for all; sample on "
                "a fixed support, and transform by the datum's own bounds"
            )
        return one.clone()

    return map_tensors(support_of(name, fn), first)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)


# --- the plate ---


@dataclass(frozen=True)
class DataPlate:
    """A plate of the model for its arguments: `size` of `full_size` data at `dim`.

    `indices`: of the data taken, if the arguments determine them; None if the plate takes all data or draws them. `scale`,
    `mask`: those of `poutine.scale` and `poutine.mask` around its latents, without the plate's own scale.
    """

    name: str
    dim: int
    size: int
    full_size: int
    indices: Tensor | None
    device: str
    scale: float | Tensor
    mask: Any

    def open(self) -> pyro.plate:
        """The same plate, for a guide; draws its indices if the model's plate does."""
        drawn = self.indices is None and self.size < self.full_size
        with SparseSubsample():
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
        """Whether the plate takes all data, in their order."""
        return self.indices is None and self.size == self.full_size

    @contextmanager
    def handlers(self) -> Iterator[None]:
        """Scale and mask of the latents."""
        with ExitStack() as stack:
            if isinstance(self.scale, Tensor) or self.scale != 1:
                stack.enter_context(poutine.scale(scale=self.scale))
            if self.mask is not None:
                stack.enter_context(poutine.mask(mask=self.mask))
            yield

    def rows_of(self, data: Tensor, index: Tensor | None) -> Tensor:
        """The rows that the plate takes: those at `index` of all data, or `data` if these are the rows taken already."""
        if len(data) == self.full_size:
            return data if self.takes_all or index is None else data[index.to(data.device)]
        if len(data) != self.size:
            raise ValueError(
                f"rows to encode have shape {tuple(data.shape)}: expected {self.full_size} rows, all data of plate "
                f"{self.name!r}, or the {self.size} rows taken"
            )
        return data

    def argument_with_rows(self, args: Any, kwargs: Any) -> int | str:
        """Position or name of the first tensor argument with a row for each datum: of all data, or of those taken."""
        arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for size in (self.full_size, self.size):
            for key, value in arguments:
                if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size:
                    return key
        shapes = {key: tuple(x.shape) for key, x in arguments if isinstance(x, Tensor)}
        raise ValueError(
            f"arguments: expected a tensor with the {self.full_size} rows of plate {self.name!r}, got {shapes}; give the rows to "
            "encode by encoder_inputs"
        )

    def is_like(self, plate: SubsampleMessenger) -> bool:
        """Whether an existing plate has the same data."""
        if (plate.size, plate.subsample_size) != (self.full_size, self.size):
            return False
        return self.indices is None or torch.equal(plate.indices.to(self.indices), self.indices)


class _Reached(Exception):
    """Ends a run of the model at a latent."""

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
        # The frame of a site has the number of data, the plate their indices; poutine.block(expose=...) hides the plate's site.
        for handler in _PYRO_STACK:
            if isinstance(handler, SubsampleMessenger) and handler.name == self.plate:
                raise _Reached(msg, handler, self.in_order)


@torch.no_grad()
def find_plate(
    model: Program, latent: Latent, name: str, args: Any, kwargs: Any, *, given: bool
) -> DataPlate:
    """The plate `name` of the model for these arguments; runs the model up to its first latent, `latent`.

    `given`: whether the indices of a subsample come with the arguments: see `indices_are_given`.
    """
    plate, msg, in_order = _run_to(model, latent.name, name, args, kwargs)
    if msg["fn"].event_shape != latent.shape[len(latent.shape) - latent.event_dim :]:
        raise ValueError(
            f"latent {latent.name!r} has event shape {tuple(msg['fn'].event_shape)} for these arguments, and had another at setup: "
            "set up a new guide on these arguments"
        )
    size, full_size = int(plate.subsample_size), int(plate.size)
    indices: Any = torch.as_tensor(plate.indices)
    device = str(indices.device)
    if in_order:  # a compiled step cannot read the values of the indices
        given = False
    elif size == full_size:
        given = not torch.equal(indices, torch.arange(size, device=device))
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
    """Whether the arguments determine which data a subsampling plate takes: such indices are the same in every run."""
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
        with poutine.block(), SparseSubsample(), _RunTo(latent, plate):
            model(*args, **kwargs)
    except _Reached as reached:
        return reached.plate, reached.msg, reached.in_order
    raise ValueError(
        f"model: expected latent {latent!r} in plate {plate!r} as at setup, got neither for these arguments; set up a new guide"
    )
