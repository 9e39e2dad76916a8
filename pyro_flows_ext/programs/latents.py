"""Latent sites in their supports and as one vector of real numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to, register_kl
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform


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


@register_kl(JacobianDelta, dist.Distribution)
def _kl_jacobian_delta(p: JacobianDelta, q: dist.TorchDistribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)  # type: ignore[no-any-return]


def bijection(support: Constraint) -> Transform:
    """The bijection from real vectors to a support."""
    return biject_to(support)  # type: ignore[no-any-return]


def is_constant(support: Constraint) -> bool:
    """Whether a support has no tensors among its parameters: such a support is the same in every run of a model."""
    parts = [v for v in vars(support).values() if isinstance(v, Tensor | Constraint)]
    return not any(isinstance(v, Tensor) or not is_constant(v) for v in parts)


AnyLatent = TypeVar("AnyLatent", bound=Latent)


def read_latent(name: str, site: Mapping[str, Any]) -> Latent:
    """The latent of a site in a trace of its model."""
    fn, value = site["fn"], site["value"]
    return Latent(
        name=name,
        support=fn.support,
        event_dim=fn.event_dim,
        shape=value.shape,
        unconstrained_shape=(
            value.shape
            if fn.support.is_discrete
            else bijection(fn.support).inverse_shape(value.shape)
        ),
        inside=value,
    )


def constrain(
    vector: Tensor, latents: Sequence[AnyLatent]
) -> Iterator[tuple[AnyLatent, JacobianDelta]]:
    """Takes vectors `(*, D)` apart: each latent, with its value `(*, *shape)` and what the map into its support adds to log q."""
    for latent, part in split(vector, latents):
        transform = bijection(latent.support)
        value = transform(part)
        ladj = transform.log_abs_det_jacobian(part, value)
        ladj = sum_rightmost(ladj, ladj.dim() - value.dim() + latent.event_dim)
        yield latent, JacobianDelta(value, log_density=-ladj, event_dim=latent.event_dim)


def split(vector: Tensor, latents: Sequence[AnyLatent]) -> Iterator[tuple[AnyLatent, Tensor]]:
    """Splits vectors `(*, D)` by latent, each with its unconstrained values `(*, *unconstrained_shape)`."""
    position = 0
    for latent in latents:
        size = latent.unconstrained_shape.numel()
        part = vector[..., position : position + size]
        yield latent, part.reshape(vector.shape[:-1] + latent.unconstrained_shape)
        position += size


def unconstrain(
    samples: Mapping[str, Tensor], latents: Sequence[Latent]
) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors `(*, D)` of values `(*, *shape)`, log|det| of the map back `(*)`, and whether those are in their support.

    Raises `ValueError` for other sites, and for shapes that do not fit.
    """
    names = {latent.name for latent in latents}
    if names != samples.keys():
        raise ValueError(f"samples: expected the sites {sorted(names)}, got {sorted(samples)}")
    parts, ladjs, inside = [], [], []
    for latent in latents:
        value, shape = samples[latent.name], latent.shape
        cut = value.dim() - len(shape)
        if cut < 0 or value.shape[cut:] != shape:
            raise ValueError(
                f"samples[{latent.name!r}]: expected shape (*, {', '.join(map(str, shape))}), "
                f"got {tuple(value.shape)}"
            )
        valid = latent.support.check(value).reshape((*value.shape[:cut], -1)).all(-1)
        inside.append(valid)
        # A value outside would make the gradient of its neighbours NaN: put one inside in its place.
        safe = torch.where(valid.reshape(valid.shape + (1,) * len(shape)), value, latent.inside)
        transform = bijection(latent.support)
        part = transform.inv(safe)
        ladj = transform.log_abs_det_jacobian(part, safe)
        ladjs.append(sum_rightmost(ladj, ladj.dim() - cut))
        parts.append(part.reshape((*value.shape[:cut], -1)))
    if len({part.shape[:-1] for part in parts}) > 1:
        raise ValueError(
            "samples: expected the same leading shape for every site, got "
            f"{ {name: tuple(value.shape) for name, value in samples.items()} }"
        )
    return torch.cat(parts, -1), torch.stack(ladjs).sum(0), torch.stack(inside).all(0)


def check_continuous(name: str, fn: dist.TorchDistribution, cause: Exception | None = None) -> None:
    """Raises `ValueError` for a discrete latent."""
    support: Any = fn.support
    if support.is_discrete:
        raise ValueError(
            f"latent {name!r} is discrete ({type(fn).__name__}), and a flow is continuous: marginalise it with "
            f"infer.config_enumerate and TraceEnum_ELBO, and give the guide poutine.block(model, hide=[{name!r}])"
        ) from cause


def check_inside(name: str, support: Constraint, value: Tensor) -> Tensor:
    """The value where guides begin, unconstrained; raises `ValueError` where it is on the boundary of its support."""
    unconstrained = bijection(support).inv(value)
    if not bool(unconstrained.isfinite().all()):
        raise ValueError(
            f"latent {name!r}: init_loc_fn gave a value on the boundary of its support ({value}); expected one inside"
        )
    return unconstrained
