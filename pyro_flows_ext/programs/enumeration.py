"""Discrete sites summed out exactly, by Pyro's parallel enumeration."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .traces import Program, sample_sites


def enumerate_in_parallel(program: Program, nesting: int) -> Program:
    """The program with every site marked for enumeration at all of its values, left of `nesting` plate dimensions."""

    def in_parallel(site: Any) -> Any:
        enumerated = site["infer"].get("enumerate") and not site["is_observed"]
        return {"enumerate": "parallel"} if enumerated else {}

    configured = poutine.infer_config(program, in_parallel)
    return _Enumeration(-1 - nesting)(configured)


class _Enumeration(EnumMessenger):
    """Pyro's messenger, which reads `value.data` for its shape; `torch.vmap` refuses that of a batched tensor."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor):
            value = torch.empty(value.shape, device="meta")
        replaced: Any = {**msg, "value": value}
        super()._pyro_post_sample(replaced)


def marginal_log_prob(trace: Trace) -> Tensor:
    """log Σ_d p(x, z, d) of a trace with enumerated sites d, scales and masks applied: a scalar in nats.

    As in `TraceEnum_ELBO`, masks apply within the sum and the common scale of the enumerated factors outside of its
    logarithm. Raises `ValueError` where these factors have different scales.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    enumerated = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    total: Tensor | float = 0.0
    factors: dict[frozenset[str], list[Tensor]] = defaultdict(list)
    scales = []
    for _, site in sample_sites(trace):
        if site_is_subsample(site):
            continue
        dims = site["packed"]["unscaled_log_prob"]._pyro_dims
        if enumerated.isdisjoint(dims):
            total = total + site["log_prob"].sum()
            continue
        factor = site["packed"]["unscaled_log_prob"]
        if site["infer"].get("_enumerate_dim") is None:
            factor = scale_and_mask(factor, 1.0, site["packed"]["mask"])
            factor._pyro_dims = dims
        plates = (f for f in site["cond_indep_stack"] if f.vectorized)
        factors[frozenset(trace.plate_to_symbol[f.name] for f in plates)].append(factor)
        scales.append(site["scale"])
    if factors:
        scale = _common_scale(scales)
        terms = contract_tensor_tree(OrderedDict(factors), enumerated, ring=_Elimination())
        total = total + scale * sum(t.sum() for group in terms.values() for t in group)
    return torch.as_tensor(total)


class _Elimination(LogRing):
    """Sums in log space, one variable after the other; Pyro's own einsum does not run under `torch.vmap`.

    Dimensions are named by the characters of `tensor._pyro_dims`.
    """

    def sumproduct(self, terms: Sequence[Any], dims: Collection[str]) -> Any:
        terms = list(terms)
        for dim in sorted(dims, key=lambda d: len(_names([t for t in terms if d in t._pyro_dims]))):
            joined = _product([t for t in terms if dim in t._pyro_dims])
            names = joined._pyro_dims
            summed = joined.logsumexp(names.index(dim))
            summed._pyro_dims = names.replace(dim, "")
            terms = [t for t in terms if dim not in t._pyro_dims] + [summed]
        return _product(terms)


def _names(terms: Sequence[Any]) -> str:
    return "".join(sorted(set().union(*(t._pyro_dims for t in terms))))


def _product(terms: Sequence[Any]) -> Any:
    """The sum of log factors over named dimensions."""
    names = _names(terms)
    total: Any = 0.0
    for term in terms:
        own = term._pyro_dims
        aligned = term.permute([own.index(n) for n in names if n in own])
        sizes = iter(aligned.shape)
        total = total + aligned.reshape([next(sizes) if n in own else 1 for n in names])
    total._pyro_dims = names
    return total


def _common_scale(scales: list[Any]) -> Any:
    first = scales[0]
    for scale in scales[1:]:
        if scale is not first and bool((torch.as_tensor(scale) != torch.as_tensor(first)).any()):
            raise ValueError(
                "expected one scale for all sites that depend on an enumerated one, got several; enumerated sites and "
                "what depends on them belong into the same subsampled plates"
            )
    return first
