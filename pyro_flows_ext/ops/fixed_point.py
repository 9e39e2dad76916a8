"""Fixed points of strictly triangular maps, with derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .roots import may_branch_on

Step = Callable[[Tensor], tuple[Tensor, Tensor]]

# A sweep that changes nothing by more than this many units in the last place is the last one.
TOLERANCE = 16


def triangular_fixed_point(
    step: Step,
    start: Tensor,
    max_sweeps: int,
    substitute: Callable[[], tuple[Tensor, Tensor] | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the x with g(x) = x, for g(x)_i that depends only on the x_j before i in some order, and aux there.

    The sweeps x <- g(x) leave the first k variables exact after k of them, so that D sweeps are always enough; they end
    when nothing changes, which is much earlier where the variables depend on each other weakly. With A = ∂g/∂x and
    B = ∂aux/∂x, cotangents v of x and u of aux reach g as w = v + Aᵀw + Bᵀu, a triangular fixed point again: one step
    keeps its graph, and the backward pass takes at most D products with it. Cost: 2 to `max_sweeps` steps, and one more
    with a graph. Where Python cannot branch on values (see `may_branch_on`), all `max_sweeps` steps have a graph, and
    derivatives of any order exist.

    Args:
        step: x `(*, D)` -> `(g(x), aux)`, closing over parameters; aux has any shape, and does not depend on the last
            variable either.
        start: any values, `(*, D)`; it may have fewer batch dimensions than g(x).
        max_sweeps: D.
        substitute: returns x and aux found in another way, without a graph, or None. It takes the place of the sweeps where
            what it finds is finite.

    Returns:
        x and aux, differentiable in all that `step` closes over. The gradient has no derivative: take second ones with
        `torch.func`.

    Example:
        >>> step = lambda x: (torch.stack([torch.ones(()), 1 + x[0] / 2]), x[0])
        >>> triangular_fixed_point(step, torch.zeros(2), 2)
        (tensor([1.0000, 1.5000]), tensor(1.))

    References:
        Song, Meng, Liao & Ermon 2021, Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving.
    """
    x, aux = step(start)
    if max_sweeps == 1:
        return x, aux
    if not may_branch_on(x) or forward_ad.unpack_dual(x).tangent is not None:
        # No custom function here: dynamo does not trace one that takes gradients, and `torch.func` and forward-mode
        # derivatives would each need a rule of their own.
        for _ in range(max_sweeps - 1):
            x, aux = step(_finite(x))
        return x, aux

    needs_graph = x.requires_grad or aux.requires_grad
    with torch.no_grad():
        found = None if substitute is None else substitute()
        if found is not None and bool(found[0].isfinite().all()):
            x, aux = found
            root = x
        else:
            x, aux, root = _swept(step, x, max_sweeps)
    if not needs_graph:
        return x, aux
    root = root.detach().requires_grad_()
    x, aux = step(root)
    return _ImplicitGradient.apply(root, x, aux, max_sweeps)


def _swept(step: Step, x: Tensor, max_sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and aux from the last of the sweeps that begin with x, and what that sweep began with, finite."""
    tolerance = TOLERANCE * torch.finfo(x.dtype).eps
    root = _finite(x)
    for _ in range(max_sweeps - 1):
        x, aux = step(root)
        last, root = root, _finite(x)
        if bool(((root - last).abs() <= tolerance * (1 + root.abs())).all()):
            break
    return x, aux, root


def _finite(x: Tensor) -> Tensor:
    """x with numbers throughout: a sweep may overflow before it is right, and a masked weight times ∞ is NaN."""
    return x.nan_to_num(0.0)


class _ImplicitGradient(torch.autograd.Function):
    """The identity on x = g(root) and aux(root); its backward pass adds what reaches them through the root."""

    @staticmethod
    def forward(root: Tensor, x: Tensor, aux: Tensor, max_sweeps: int) -> tuple[Tensor, Tensor]:
        return x.clone(), aux.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.max_sweeps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, u: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: it marks w, but the root too depends on the parameters, and has lost sight of them.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "triangular_fixed_point: this gradient cannot be differentiated again (create_graph=True); take second "
                "derivatives with torch.func, or of the direction that needs no fixed point"
            )
        root, x, aux = ctx.saved_tensors
        tolerance = TOLERANCE * torch.finfo(x.dtype).eps
        w = v
        # Neither x nor aux depends on the last variable, whose w is therefore right from the start.
        for _ in range(ctx.max_sweeps - 1):
            pairs = [(t, g) for t, g in ((x, w), (aux, u)) if t.requires_grad]
            outputs, cotangents = zip(*pairs, strict=True)
            (through_root,) = torch.autograd.grad(
                outputs, root, cotangents, retain_graph=True, materialize_grads=True
            )
            last, w = w, v + through_root
            # By rows, whose gradients may differ by orders of magnitude; written so that NaN counts as settled.
            if not bool(((w - last).abs().amax(-1) > tolerance * w.abs().amax(-1)).any()):
                break
        return None, w, u, None
