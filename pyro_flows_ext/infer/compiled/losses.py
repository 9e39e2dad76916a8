"""Losses as tensors: the value and what to differentiate, without the `.item()` of Pyro's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.trace_elbo import _compute_log_r
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from ..elbo import AnnealedELBO, ImportanceWeightedELBO
from .arguments import Call
from .refusal import Refusal

SUPPORTED = (Trace_ELBO, TraceMeanField_ELBO, ImportanceWeightedELBO)


def check_loss(loss: ELBO) -> None:
    """Raises `Refusal` for a loss that has no form here. A subclass may compute anything."""
    inner = loss.elbo if type(loss) is AnnealedELBO else loss
    if type(inner) not in SUPPORTED:
        names = ", ".join(kind.__name__ for kind in (*SUPPORTED, AnnealedELBO))
        raise Refusal(f"{type(inner).__name__} is not among the losses that compile ({names})")


def loss_and_surrogate(call: Call, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss, and a tensor with the gradient of the estimator of it that it is; `beta` for an `AnnealedELBO`."""
    loss, model, guide, args, kwargs = call.loss, call.model, call.guide, call.args, call.kwargs
    if beta is not None:
        annealed = _AtBeta(loss, beta)
        model, guide = annealed._tempered(model, guide)
        return loss_and_surrogate(Call(loss.elbo, model, guide, args, kwargs), None)
    if isinstance(loss, ImportanceWeightedELBO):
        bound, surrogate = loss._estimate(model, guide, args, kwargs)
        return -bound, -surrogate
    particle = _mean_field if isinstance(loss, TraceMeanField_ELBO) else _by_trace
    terms = [
        particle(model_trace, guide_trace)
        for model_trace, guide_trace in loss._get_traces(model, guide, args, kwargs)
    ]
    value, surrogate = (torch.stack(column).sum() for column in zip(*terms, strict=True))
    return -value / loss.num_particles, -surrogate / loss.num_particles


class _AtBeta(AnnealedELBO):
    """An annealed bound at a β that is a tensor, which a graph has as an input."""

    def __init__(self, annealed: AnnealedELBO, beta: Tensor):
        super().__init__(annealed.elbo, annealed.schedule, annealed.term)
        self._beta = beta

    @property
    def beta(self) -> Any:
        return self._beta


def _by_trace(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """`Trace_ELBO` of one pair of traces: Σ log p - Σ log q; score-function terms for draws without a gradient."""
    value: Any = 0.0
    surrogate: Any = 0.0
    log_r = None
    for site in _samples(model_trace):
        value = value + site["log_prob_sum"]
        surrogate = surrogate + site["log_prob_sum"]
    for site in _samples(guide_trace):
        _, score_function, entropy = site["score_parts"]
        value = value - site["log_prob_sum"]
        if not is_identically_zero(entropy):
            surrogate = surrogate - entropy.sum()
        if not is_identically_zero(score_function):
            if log_r is None:
                log_r = _compute_log_r(model_trace, guide_trace)
            reward = log_r.sum_to(site["cond_indep_stack"])
            surrogate = surrogate + (reward * score_function).sum()
    return value, surrogate


def _mean_field(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """`TraceMeanField_ELBO` of one pair of traces: analytic divergences where there are any."""
    value: Any = 0.0
    for site in _samples(model_trace):
        if site["is_observed"]:
            value = value + site["log_prob_sum"]
            continue
        guide_site: Any = guide_trace.nodes[site["name"]]
        try:
            kl = kl_divergence(guide_site["fn"], site["fn"])
        except NotImplementedError:
            entropy = guide_site["score_parts"].entropy_term
            value = value + site["log_prob_sum"] - entropy.sum()
            continue
        kl = scale_and_mask(kl, scale=guide_site["scale"], mask=guide_site["mask"])
        total = kl.sum() if isinstance(kl, Tensor) else kl * guide_site["fn"].batch_shape.numel()
        value = value - total
    for site in _samples(guide_trace):
        if site["name"] not in model_trace.nodes:
            value = value - site["score_parts"].entropy_term.sum()
    return value, value


def _samples(trace: Trace) -> Iterator[Any]:
    return (site for site in trace.nodes.values() if site["type"] == "sample")
