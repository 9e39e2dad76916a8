"""Supports of latent sites: maps from ℝⁿ onto them, and distributions that no such map exists for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from ..distributions.tensors import map_tensors

_Independent = type(constraints.real_vector)

# Distributions of angles: their declared support is the real line, on which their density is periodic.
CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
SPHERICAL = (dist.VonMises3D, dist.ProjectedNormal)
# Distributions with atoms: their log_prob is no density of real numbers.
ATOMIC = (
    dist.Delta,
    dist.Empirical,
    dist.ZeroInflatedDistribution,
    dist.RelaxedBernoulliStraightThrough,
    dist.RelaxedOneHotCategoricalStraightThrough,
)


class ImageConstraint(Constraint):
    """The image of a base support under transforms: the support of a `TransformedDistribution` of a bounded base."""

    def __init__(self, base: Constraint, transforms: list[Transform]):
        self.base, self.transforms = base, transforms
        self.is_discrete = base.is_discrete
        self.event_dim = max(base.event_dim, ComposeTransform(transforms).codomain.event_dim)
        super().__init__()

    def __repr__(self) -> str:
        return f"ImageConstraint({self.base}, {self.transforms})"

    def check(self, value: Tensor) -> Tensor:
        event_dim = self.event_dim
        inside = torch.ones((), dtype=torch.bool, device=value.device)
        for transform in reversed(self.transforms):
            valid = transform.codomain.check(value)
            inside = inside & valid.reshape((*valid.shape[: value.dim() - event_dim], -1)).all(-1)
            value = transform.inv(value)
        valid = self.base.check(value)
        return inside & valid.reshape((*valid.shape[: value.dim() - event_dim], -1)).all(-1)


class PositiveDefinite(Transform):
    """ℝ^{n(n+1)/2} -> positive definite matrices (n, n): L Lᵀ, L lower triangular with exp of the diagonal.

    log|det| is that of the n(n+1)/2 free entries: n log 2 + Σ_i (n - i + 2) log L_ii for i = 1 ... n (exp included).
    """

    domain = constraints.real_vector
    codomain: Constraint = constraints.positive_definite
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        L = _lower(x)
        return L @ L.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return _vector(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        diagonal = _log_diagonal(x)
        n = diagonal.shape[-1]
        powers = torch.arange(n + 1, 1, -1, dtype=x.dtype, device=x.device)
        return n * math.log(2) + (powers * diagonal).sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        n = _order(shape[-1])
        return torch.Size((*shape[:-1], n, n))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


class LowerCholesky(PositiveDefinite):
    """ℝ^{n(n+1)/2} -> lower triangular matrices with a positive diagonal, by exp."""

    codomain = constraints.lower_cholesky

    def _call(self, x: Tensor) -> Tensor:
        return _lower(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return _vector(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return _log_diagonal(x).sum(-1)


def _order(size: int) -> int:
    return round(((8 * size + 1) ** 0.5 - 1) / 2)


def _lower(x: Tensor) -> Tensor:
    n = _order(x.shape[-1])
    rows, cols = torch.tril_indices(n, n, device=x.device)
    matrix = x.new_zeros(*x.shape[:-1], n, n)
    matrix[..., rows, cols] = x
    return matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).exp())


def _vector(L: Tensor) -> Tensor:
    rows, cols = torch.tril_indices(L.shape[-1], L.shape[-1], device=L.device)
    logs = L.tril(-1) + torch.diag_embed(L.diagonal(dim1=-2, dim2=-1).log())
    return logs[..., rows, cols]


def _log_diagonal(x: Tensor) -> Tensor:
    steps = torch.arange(1, _order(x.shape[-1]) + 1, device=x.device)
    return x[..., steps * (steps + 1) // 2 - 1]


def bijection(support: Constraint) -> Transform:
    """The map from ℝⁿ onto a support: `biject_to`, and maps for constraints that torch has none for.

    Raises `NotImplementedError` for a support without one, such as a sphere.
    """
    if isinstance(support, ImageConstraint):
        return ComposeTransform([bijection(support.base), *support.transforms])
    if support is constraints.positive_definite:
        return PositiveDefinite()
    if support is constraints.lower_cholesky:
        return LowerCholesky()
    if isinstance(support, _Independent):
        return IndependentTransform(
            bijection(support.base_constraint), support.reinterpreted_batch_ndims
        )
    return biject_to(support)


# --- the support of a latent ---


def support_of(name: str, fn: Any) -> Constraint:
    """The set on which the distribution of latent `name` has a density, onto which `bijection` maps.

    Raises `ValueError` for discrete distributions, for those of directions, and for those with atoms.
    """
    try:
        is_discrete = fn.support.is_discrete
    except NotImplementedError:
        raise ValueError(
            f"latent {name!r} has a distribution that declares no support ({type(fn).__name__}): expected one with a `support`. "
            "Subclass it with that attribute, or use another distribution"
        ) from None
    if is_discrete:
        raise ValueError(
            f"latent {name!r} is discrete ({type(fn).__name__}), and a flow is continuous: marginalise it with "
            f"infer.config_enumerate and TraceEnum_ELBO, and give the guide poutine.block(model, hide=[{name!r}])"
        )
    for part in _parts(fn):
        kind = type(part).__name__
        if isinstance(part, CIRCULAR):
            raise ValueError(
                f"latent {name!r} is an angle ({kind}): expected a latent on the real line, since a flow has no period. "
                f"Use poutine.reparam(model, config={{{name!r}: CircularReparam()}}), from pyro_flows_ext.guides"
            )
        if isinstance(part, SPHERICAL):
            reparam = (
                "ProjectedNormalReparam(), from pyro.infer.reparam"
                if isinstance(part, dist.ProjectedNormal)
                else "CircularReparam(), from pyro_flows_ext.guides"
            )
            raise ValueError(
                f"latent {name!r} is a direction ({kind}): expected one in a Euclidean space, since no smooth map takes that "
                f"to a sphere. Use poutine.reparam(model, config={{{name!r}: ...}}) with {reparam}"
            )
        if isinstance(part, ATOMIC):
            raise ValueError(
                f"latent {name!r} has a distribution with atoms ({kind}): expected a density. Compute its value with "
                "pyro.deterministic, or use a continuous distribution in place of it"
            )
    support = true_support(name, fn)
    try:
        bijection(support)
    except NotImplementedError:
        raise ValueError(
            f"latent {name!r} has the support {support} ({type(fn).__name__}): expected one that torch's biject_to has a map "
            "for. Sample a latent on such a support, and compute this one from it"
        ) from None
    return support


def check_log_prob(name: str, fn: Any, value: Tensor) -> None:
    """Raises `ValueError` unless the distribution has a finite log-density at the value where a guide begins."""
    try:
        log_prob = fn.log_prob(value)
    except NotImplementedError:
        hint = "LatentStableReparam" if "Stable" in type(fn).__name__ else "a reparametriser"
        raise ValueError(
            f"latent {name!r} has a distribution without log_prob ({type(fn).__name__}): expected a density. Use "
            f"{hint} from pyro.infer.reparam, or another distribution"
        ) from None
    if not bool(log_prob.isfinite().all()):
        raise ValueError(
            f"latent {name!r} has log-density {log_prob.tolist()} where init_loc_fn begins ({value.tolist()}): expected finite "
            "values. Use another init_loc_fn, or check the parameters of the prior"
        )


def _parts(fn: Any) -> Iterator[Any]:
    """A distribution and those that it wraps."""
    yield fn
    for key in ("base_dist", "component_distribution", "component0", "component1"):
        inner = getattr(fn, key, None)
        if isinstance(inner, torch.distributions.Distribution):
            yield from _parts(inner)


def true_support(name: str, fn: Any) -> Constraint:
    """The set on which a distribution has a density; `fn.support`, where that is right."""
    if isinstance(fn, torch.distributions.Independent):
        inner = true_support(name, fn.base_dist)
        n = fn.reinterpreted_batch_ndims
        return constraints.independent(inner, n) if n else inner
    if isinstance(fn, (dist.MaskedDistribution, dist.ExpandedDistribution)):
        return true_support(name, fn.base_dist)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return _of_components(name, fn.component_distribution)
    if type(fn).__name__ == "GeneralizedPareto" and bool((fn.concentration >= 0).all()):
        return constraints.greater_than_eq(
            fn.loc
        )  # torch has an interval up to infinity, which no map fits
    # A plain TransformedDistribution declares the codomain of its last transform, which is too large for a bounded base.
    if type(fn).support is torch.distributions.TransformedDistribution.support and fn.transforms:
        base = true_support(name, fn.base_dist)
        if not _same(base, fn.transforms[0].domain):
            if not all(transform.bijective for transform in fn.transforms):
                raise ValueError(
                    f"latent {name!r} has a transform that is not bijective ({fn.transforms}): expected one with an inverse"
                )
            return ImageConstraint(base, list(fn.transforms))
    return fn.support


def _of_components(name: str, components: Any) -> Constraint:
    """The support that all components of a mixture share."""
    axis = -1 - components.event_dim

    def shared(bound: Tensor) -> Tensor:
        if bound.dim() < -axis:
            return bound
        one = bound.select(axis, 0)
        if not bool((bound == one.unsqueeze(axis)).all()):
            raise ValueError(
                f"latent {name!r} is a mixture of components on different supports ({components.support}): expected one "
                "support for all. Sample on a common support, or enumerate the component"
            )
        return one

    return map_tensors(true_support(name, components), shared)


def _same(a: Constraint, b: Constraint) -> bool:
    """Whether two constraints are the same set, up to its boundary."""
    while isinstance(a, _Independent):
        a = a.base_constraint
    while isinstance(b, _Independent):
        b = b.base_constraint
    closed: dict[Constraint, Constraint] = {constraints.nonnegative: constraints.positive}
    a, b = closed.get(a, a), closed.get(b, b)
    return a is b or (type(a) is type(b) and repr(a) == repr(b) and not tensors_of(a))


def tensors_of(obj: Any) -> list[Tensor]:
    """The tensors in a constraint or distribution."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(obj, note)
    return found
