"""Latent sites in their supports and as one vector of real numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import register_kl
from torch.distributions.constraints import Constraint

from .supports import bijection, tensors_of, true_support


@dataclass(frozen=True)
class Latent:
    """A continuous latent site of a model.

    `shape` is the shape of its values, with `event_dim` event dimensions on the right; `unconstrained_shape` differs
    from it for some supports, such as a simplex. `inside` is one value within the support.
    """

    name: str
    support: Constraint
    event_dim: int
    shape: torch.Size
    unconstrained_shape: torch.Size
    inside: Tensor


class JacobianDelta(dist.Delta):
    """A `Delta` at the image of a draw under a bijection, with log-density -log|det J|.

    `TraceMeanField_ELBO` counts the log-density as well: Pyro's KL(Delta, p) = -log p leaves it out.
    """


def _kl_jacobian_delta(p: JacobianDelta, q: dist.TorchDistribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)


register_kl(JacobianDelta, dist.Distribution)(_kl_jacobian_delta)


def is_constant(support: Constraint) -> bool:
    """Whether a support has no tensors among its parameters: such a support is the same in every run of a model."""
    return not tensors_of(support)


AnyLatent = TypeVar("AnyLatent", bound=Latent)


def read_latent(name: str, site: Mapping[str, Any]) -> Latent:
    """The latent of a site in a trace of its model."""
    fn, value = site["fn"], site["value"]
    support = true_support(name, fn)
    try:
        # `inverse_shape` of torch's affine transforms imports sympy.
        shape = bijection(support).inv(value).shape
    except (
        NotImplementedError
    ):  # discrete, or on a sphere: a latent that only its own guide can draw
        shape = value.shape
    return Latent(name, support, fn.event_dim, value.shape, shape, value)


def constrain(
    vector: Tensor, latents: Sequence[AnyLatent], *, in_plates: bool = False
) -> Iterator[tuple[AnyLatent, JacobianDelta]]:
    """Splits vectors `(*, D)` into latents, each with its value and minus log|det| of the map into its support: see `split`."""
    for latent, part in split(vector, latents, in_plates=in_plates):
        value, ladj = to_support(part, latent.support, latent.event_dim)
        yield latent, JacobianDelta(value, log_density=-ladj, event_dim=latent.event_dim)


def to_support(part: Tensor, support: Constraint, event_dim: int) -> tuple[Tensor, Tensor]:
    """The image of unconstrained values in a support, and log|det| of the map, one number for each event."""
    transform = bijection(support)
    value = transform(part)
    ladj = transform.log_abs_det_jacobian(part, value)
    return value, sum_rightmost(ladj, ladj.dim() - value.dim() + event_dim)


def split(
    vector: Tensor, latents: Sequence[AnyLatent], *, in_plates: bool = False
) -> Iterator[tuple[AnyLatent, Tensor]]:
    """Splits vectors `(*, D)` by latent, each with its unconstrained values `(*, *unconstrained_shape)`.

    With `in_plates` the dimensions `*` are those of plates around the program, of which the last coincide with the plates
    of a latent, and are 1.
    """
    position = 0
    for latent in latents:
        size = latent.unconstrained_shape.numel()
        outside = vector.shape[:-1]
        if in_plates:
            num_plates = len(latent.shape) - latent.event_dim
            outside = outside[: max(0, len(outside) - num_plates)]
        part = vector[..., position : position + size]
        yield latent, part.reshape(outside + latent.unconstrained_shape)
        position += size


def unconstrain(
    samples: Mapping[str, Tensor], latents: Sequence[Latent]
) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors `(*, D)` of values `(*, *shape)`, log|det| of the map back `(*)`, and whether those are in their support.

    Raises `ValueError` for other sites, and for shapes that do not fit.
    """
    leading = leading_shape(samples, latents)
    parts, ladjs, inside = [], [], []
    for latent in latents:
        value, shape, cut = samples[latent.name], latent.shape, len(leading)
        valid = latent.support.check(value).reshape((*value.shape[:cut], -1)).all(-1)
        inside.append(valid)
        # A value outside would make the gradient of its neighbours NaN: put one inside in its place.
        safe = torch.where(valid.reshape(valid.shape + (1,) * len(shape)), value, latent.inside)
        transform = bijection(latent.support)
        part = transform.inv(safe)
        ladj = transform.log_abs_det_jacobian(part, safe)
        ladjs.append(sum_rightmost(ladj, ladj.dim() - cut))
        parts.append(part.reshape((*value.shape[:cut], -1)))
    return torch.cat(parts, -1), torch.stack(ladjs).sum(0), torch.stack(inside).all(0)


def leading_shape(samples: Mapping[str, Tensor], latents: Sequence[Latent]) -> torch.Size:
    """The shape `*` that values `(*, *shape)` of the latents share; raises `ValueError` where sites or shapes do not fit."""
    names = {latent.name for latent in latents}
    if names != samples.keys():
        raise ValueError(f"samples: expected the sites {sorted(names)}, got {sorted(samples)}")
    found = set()
    for latent in latents:
        value, shape = samples[latent.name], latent.shape
        cut = value.dim() - len(shape)
        if cut < 0 or value.shape[cut:] != shape:
            raise ValueError(
                f"samples[{latent.name!r}]: expected shape (*, {', '.join(map(str, shape))}), "
                f"got {tuple(value.shape)}"
            )
        found.add(value.shape[:cut])
    if len(found) > 1:
        raise ValueError(
            "samples: expected the same leading shape for every site, got "
            f"{ {name: tuple(value.shape) for name, value in samples.items()} }"
        )
    return found.pop()


def check_inside(name: str, support: Constraint, value: Tensor) -> Tensor:
    """The value where guides begin, unconstrained; raises `ValueError` where it is on the boundary of its support."""
    unconstrained = bijection(support).inv(value)
    if not bool(unconstrained.isfinite().all()):
        raise ValueError(
            f"latent {name!r}: init_loc_fn gave a value on the boundary of its support ({value}); expected one inside"
        )
    return unconstrained
