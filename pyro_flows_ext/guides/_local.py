"""The latents that are local to a plate of data, and what an amortized guide cannot stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions.constraints import Constraint

from ..distributions.tensors import map_tensors
from ..programs import Latent, check_inside, check_log_prob, support_of, tensors_of


@dataclass(frozen=True)
class LocalLatent(Latent):
    """A latent of one datum; its shape begins with the dimensions of plates within the datum, `inner`: (name, size, dim)."""

    inner: tuple[tuple[str, int, int], ...]


def read_latents(trace: Trace, plate: str | None) -> tuple[str, list[LocalLatent], Tensor]:
    """The data plate of a model run, its latents, and the mean over the data of their values, unconstrained `(D)`.

    `plate`: the data plate's name; None where the latents have but one in common. Raises `ValueError` for what an
    amortized guide cannot stand for.
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
                    f"latents {first['name']!r} and {name!r} have a {key} of their own each, and one joint density in the "
                    f"guide: expected all latents within the same poutine.{key}"
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
        raise ValueError("the model has no latents: expected some in a plate of data")
    stacks = {name: site["cond_indep_stack"] for name, site in sites.items()}
    frames = {f.name: f for stack in stacks.values() for f in stack}
    for f in frames.values():
        if not f.vectorized or f.size < 0:
            raise ValueError(f"plate {f.name!r}: expected one with a size, used by `with`")
    if plate is not None and plate not in frames:
        raise ValueError(
            f"plate: expected one that has latents in it, {sorted(frames)}; got {plate!r}"
        )
    outside = [
        name
        for name, stack in stacks.items()
        if (plate not in {f.name for f in stack} if plate else not stack)
    ]
    if outside:
        where = f"outside of plate {plate!r}" if plate else "global, in no plate"
        raise ValueError(
            f"latents {outside} are {where}: give this guide poutine.block(model, hide={outside}), and those to another "
            f"guide with poutine.block(model, expose={outside}); AutoGuideList joins the two"
        )
    common = set.intersection(*({f.name for f in stack} for stack in stacks.values()))
    names = [plate] if plate else sorted(common)
    if not names:
        of = {name: [f.name for f in stack] for name, stack in stacks.items()}
        raise ValueError(
            f"latents have no plate in common ({of}): expose those of one plate to each guide, with poutine.block"
        )
    if len(names) > 1:
        raise ValueError(f"latents lie in the plates {names}: name that of the data by plate=")
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

    return map_tensors(support_of(name, fn), first)  # type: ignore[no-any-return]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    return type(a) is type(b) and bool(a == b)
