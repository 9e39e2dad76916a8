"""A loss with its arguments: as a key and input tensors, and as a differentiable tensor."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import runtime
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from ...programs import Program
from ..elbo import AnnealedELBO, ImportanceWeightedELBO
from .unsupported import UnsupportedForCompilation, check_plain

# Losses with a form here. A subclass may compute anything, and is not among them.
SUPPORTED = (Trace_ELBO, TraceMeanField_ELBO, ImportanceWeightedELBO)

_PLAIN = (int, bool, str, type(None))


class Call(NamedTuple):
    """The loss of a model and a guide with some arguments."""

    loss: Any  # an ELBO; its abstract base declares no loss
    model: Program
    guide: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def state_of(call: Call) -> list[Any]:
    """The objects of a call whose state a program can read, without the step counter of an annealed loss."""
    loss = call.loss.elbo if isinstance(call.loss, AnnealedELBO) else call.loss
    leaves = [
        leaf for leaf in _flatten((call.args, call.kwargs))[0] if not isinstance(leaf, Tensor)
    ]
    return [call.model, call.guide, loss, *leaves]


def read_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Hashable, list[Tensor]]:
    """A key of the arguments, and their tensors.

    The key holds the structure, the layout of every tensor, the values of all other leaves, and the global settings of
    torch that a graph has as constants.

    Raises `UnsupportedForCompilation` for leaves without a hash, for tensors that a graph cannot take, and for settings under which
    compiled steps would differ from eager ones.
    """
    leaves: list[Any] = [*args, *kwargs.values()]
    key: list[Any] = [_settings(), len(args), *kwargs]
    if not all(type(leaf) is Tensor or type(leaf) in _PLAIN for leaf in leaves):
        leaves, structure = _flatten((args, kwargs))
        key[1:] = [structure]
    tensors: list[Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            check_plain(leaf, "an argument")
            if leaf.requires_grad:
                raise UnsupportedForCompilation(
                    "an argument requires a gradient, which compiled steps do not accumulate; pass argument.detach(), or "
                    "register a parameter by pyro.param or pyro.module"
                )
            key.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
            tensors.append(leaf)
        else:
            key.append(_constant(leaf))
    return tuple(key), tensors


def _settings() -> Hashable:
    if runtime._PYRO_STACK:
        raise UnsupportedForCompilation(
            "the step is called within a Pyro handler, whose effects a graph would keep; apply handlers to model or guide"
        )
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise UnsupportedForCompilation(
            "gradients are disabled; call the step outside of no_grad and inference_mode"
        )
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise UnsupportedForCompilation("autocast is enabled, which a graph would apply twice")
    return torch.get_default_dtype()


def _constant(leaf: Any) -> Hashable:
    """Type and value of a leaf that is not a tensor."""
    if isinstance(leaf, float):  # -0.0 == 0.0 and NaN != NaN
        return type(leaf), leaf.hex()
    try:
        hash(leaf)
    except TypeError:
        raise UnsupportedForCompilation(
            f"an argument of type {type(leaf).__name__} has no hash, and so can be neither an input nor a constant; pass a "
            "tensor"
        ) from None
    return type(leaf), leaf


# --- aliases ---


def place(tensor: Tensor) -> Hashable:
    """Address, shape, strides, dtype and device of the elements; the identity of a tensor without elements."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def aliases(tensors: Sequence[Tensor], known: Sequence[Tensor] = ()) -> Hashable:
    """For each tensor, the first among `known` and the tensors before it with the same identity, and with the same place.

    None where no two are aliases. Tensors that overlap in part are not aliases: each is an input by itself.
    """
    objects: dict[Any, int] = {}
    places: dict[Any, int] = {}
    for i, tensor in enumerate(known):
        objects.setdefault(id(tensor), i)
        places.setdefault(place(tensor), i)
    pattern = []
    for i, tensor in enumerate(tensors, len(known)):
        first = objects.setdefault(id(tensor), i), places.setdefault(place(tensor), i)
        pattern.append(None if first == (i, i) else first)
    return tuple(pattern) if any(first is not None for first in pattern) else None


def storages(tensors: Sequence[Tensor]) -> set[int]:
    """The addresses of the storages of tensors with elements."""
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def unaliased(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors with the same strides, each in memory of its own."""
    copies = []
    for tensor in tensors:
        if tensor.numel() == 0:
            copies.append(
                torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
            )
            continue
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        memory = tensor.detach().as_strided((extent,), (1,)).clone()
        copies.append(memory.as_strided(tensor.shape, tensor.stride(), 0))
    return copies


def with_tensors(call: Call, tensors: Sequence[Tensor]) -> Call:
    """The call with other tensors in place of those that `read_arguments` returns, in their order."""
    from torch.utils._pytree import tree_unflatten

    leaves, structure = _flatten((call.args, call.kwargs))
    rest = iter(tensors)
    replaced = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(replaced, structure)
    return call._replace(args=args, kwargs=kwargs)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    from torch.utils._pytree import tree_flatten

    return tree_flatten(tree)


# --- the loss as a tensor ---


def check_loss(loss: ELBO) -> None:
    """Raises `UnsupportedForCompilation` for a loss that is not among `SUPPORTED`."""
    inner = loss.elbo if type(loss) is AnnealedELBO else loss
    if type(inner) not in SUPPORTED:
        names = ", ".join(kind.__name__ for kind in (*SUPPORTED, AnnealedELBO))
        raise UnsupportedForCompilation(
            f"{type(inner).__name__} is not among the losses that compile: {names}"
        )


def loss_and_surrogate(call: Call, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss, and a tensor whose gradient is the loss's gradient estimator; `beta` for an `AnnealedELBO`."""
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
    """An annealed bound whose β is a tensor, and so an input of the graph."""

    def __init__(self, annealed: AnnealedELBO, beta: Tensor):
        super().__init__(annealed.elbo, annealed.schedule, annealed.term)
        self._beta = beta

    @property
    def beta(self) -> Any:
        return self._beta


def _by_trace(model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
    """`Trace_ELBO` of one pair of traces: Σ log p - Σ log q; score-function terms for draws without a gradient."""
    from pyro.infer.trace_elbo import _compute_log_r

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
    """`TraceMeanField_ELBO` of one pair of traces: analytic divergences where torch has them."""
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
