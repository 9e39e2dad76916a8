"""Path gradients: what a guide's parameters do through its draws alone, with their part in log q left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...ops import may_branch_on
from ...programs import is_delta
from ...transforms import FlowTransform, InverseFlow

# Flows that draw in one pass and invert by sweeps or roots, which the density at a cut would take. Up to this dimension
# their Jacobian, D backward passes in one batch, is cheaper: a step takes 1.2 to 1.5 times as long as without paths for
# D = 4 and 10, 1.6 to 3.0 for 32 and 2.6 to 2.8 for 64; with the inverse 2.1 to 2.9, 3.8 to 6.5 and 3.9 to 7.9.
MAX_JACOBIAN_DIM = 64
# Up to this dimension the Jacobian of all layers takes less time than a score carried from layer to layer, where that is possible.
MAX_BATCHED_DIM = 20


class CutMessenger(Messenger):
    """Cuts the graph at every random draw z of a guide: what comes after sees a leaf of the same value.

    `live`: site -> z with its graph, in the order of sampling; `cuts`: site -> the leaf. log q(z) is evaluated at the
    leaf, so that its gradient there is the partial derivative in z, and the parameters' own is left to whoever wants it.
    Draws of `Delta`, or without a graph, are not random or have no parameters, and are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, Tensor] = {}
        self.cuts: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if (
            msg["done"]
            or msg["is_observed"]
            or msg["value"] is not None
            or site_is_subsample(msg)
            or is_delta(fn)
            or not fn.has_rsample
        ):
            return
        if _inverts_slowly(fn):
            live, cut, log_prob = _draw_forward(fn)
            fn = _Known(fn, log_prob)
        else:
            live = fn(*msg["args"], **msg["kwargs"])
            cut = live.detach().requires_grad_() if live.requires_grad else live
        msg.update(value=cut, fn=fn, done=True)
        if cut is not live:
            self.live[msg["name"]], self.cuts[msg["name"]] = live, cut


class _Known(dist.TorchDistribution):
    """A distribution of which one draw is known, and the log-density there."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, fn: Any, log_prob: Tensor):
        self._fn, self._log_prob = fn, log_prob
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self._fn.support

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._fn.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob


def _inverts_slowly(fn: Any) -> bool:
    """Whether this is the density of a flow over vectors that draws fast, and whose Jacobian is small."""
    if not isinstance(fn, torch.distributions.TransformedDistribution):
        return False
    transforms: list[Any] = fn.transforms
    if len(fn.event_shape) != 1 or fn.base_dist.event_shape != fn.event_shape:
        return False
    if not all(isinstance(t, FlowTransform) for t in transforms):
        return False
    parts = [p for t in transforms for p in t.modules() if isinstance(p, FlowTransform)]
    if not any(p.inverts_iteratively for p in parts) or any(
        isinstance(p, InverseFlow) for p in parts
    ):
        return False
    return fn.event_shape[0] <= MAX_JACOBIAN_DIM or _carries_scores(fn)


def _carries_scores(fn: Any) -> bool:
    return all(t.carries_scores for t in fn.transforms)


def draw_with_density(fn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A draw z of a density, a leaf of the same value, and log q at the leaf, differentiable there.

    The gradient of log q at the leaf is the partial derivative in z at fixed parameters.
    """
    if _inverts_slowly(fn):
        return _draw_forward(fn)
    live = fn.rsample()
    cut = live.detach().requires_grad_()
    return live, cut, fn.log_prob(cut)


def _draw_forward(fn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """z = T(ε), a leaf at z, and log q with its gradient there, from the forward pass alone.

    With J = ∂T/∂ε, and s(ε) = log q(T(ε)) as the pass gives it, ∂ log q / ∂z at fixed parameters is h = J⁻ᵀ ∂s/∂ε; and
    s - hᵀ(T - z) has this derivative in z, and the right one in whatever else T depends on, as T = z there. So no
    inverse is needed, which sweeps or finds roots in the flows that draw fast. In the idea of Vaitl, Nicoli, Nakajima &
    Kessel 2024, Fast and unified path gradient estimators for normalizing flows.
    """
    noise = fn.base_dist.rsample()
    if not noise.requires_grad:
        noise.requires_grad_()
    carried = noise.shape[-1] > MAX_BATCHED_DIM and _carries_scores(fn)
    if carried and may_branch_on(noise.detach()):
        live, log_prob, h = _carry_score(fn, noise)
    else:
        live, log_prob, h = _solve_jacobian(fn, noise)
    cut = live.detach().requires_grad_()
    return live, cut, log_prob + (h * (cut - live)).sum(-1)


def _carry_score(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, log q(z) and h, the score carried from layer to layer: see `FlowTransform.forward_and_score`."""
    log_prob = fn.base_dist.log_prob(noise)
    (score,) = torch.autograd.grad(log_prob.sum(), noise, retain_graph=True)
    live = noise
    for transform in fn.transforms:
        live, ladj, score = transform.forward_and_score(live, score)
        log_prob = log_prob - ladj
    return live, log_prob, score


def _solve_jacobian(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, log q(z) and h from the Jacobian of all layers together: D + 1 backward passes in one batch."""
    live = noise
    for transform in fn.transforms:
        live = transform(live)
    log_prob = fn.log_prob(live)  # no pass: the transforms remember this one
    D = live.shape[-1]
    # The rows of J, and ∂s/∂ε as one more.
    eye = torch.eye(D + 1, dtype=live.dtype, device=live.device)
    seeds = eye.reshape(D + 1, *(1,) * log_prob.dim(), D + 1).expand(-1, *log_prob.shape, -1)
    (rows,) = torch.autograd.grad(
        (live, log_prob),
        noise,
        (seeds[..., :D], seeds[..., D]),
        retain_graph=True,
        is_grads_batched=True,
    )
    J, slope = rows[:D].movedim(0, -2), rows[D]
    # Unchecked: a singular J gives a gradient that is not finite, as a flow that collapsed does anyway.
    return live, log_prob, torch.linalg.solve_ex(J.mT, slope.unsqueeze(-1))[0].squeeze(-1)


def through_draws(
    objective: Tensor, lives: Sequence[Tensor], cuts: Sequence[Tensor]
) -> list[Tensor]:
    """∂ objective / ∂z for every draw z, later draws that depend on it included: what to send back through `lives`.

    `lives` and `cuts` in the order of sampling. The objective depends on the draws through `cuts`.
    """
    if not cuts:
        return []
    direct = torch.autograd.grad(
        objective, cuts, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    totals = list(direct)
    through = torch.autograd.grad(lives, cuts, totals, retain_graph=True, allow_unused=True)
    if all(t is None for t in through):
        return totals  # no draw depends on another
    for i in range(len(cuts) - 1, 0, -1):
        through = torch.autograd.grad(
            lives[i], cuts[:i], totals[i], retain_graph=True, allow_unused=True
        )
        totals[:i] = [g if t is None else g + t for g, t in zip(totals[:i], through, strict=True)]
    return totals


def has_parameters(value: Tensor, cuts: Iterable[Tensor]) -> bool:
    """Whether the graph of a value ends in any leaf but `cuts`."""
    known = {id(cut) for cut in cuts}
    if value.grad_fn is None:
        return value.requires_grad and id(value) not in known
    seen, stack = {value.grad_fn}, [value.grad_fn]
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            return True
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return False
