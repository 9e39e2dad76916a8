"""Discrete sites summed out exactly, by Pyro's parallel enumeration."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_tensor_tree
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
    return poutine.enum(configured, first_available_dim=-1 - nesting)  # type: ignore[no-any-return]


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
        terms = contract_tensor_tree(OrderedDict(factors), enumerated)
        total = total + scale * sum(t.sum() for group in terms.values() for t in group)
    return torch.as_tensor(total)


def _common_scale(scales: list[Any]) -> Any:
    first = scales[0]
    for scale in scales[1:]:
        if scale is not first and bool((torch.as_tensor(scale) != torch.as_tensor(first)).any()):
            raise ValueError(
                "expected one scale for all sites that depend on an enumerated one, got several; enumerated sites and "
                "what depends on them belong into the same subsampled plates"
            )
    return first
