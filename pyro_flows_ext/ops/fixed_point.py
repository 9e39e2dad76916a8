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


def triangular_fixed_point(step: Step, start: Tensor, max_sweeps: int) -> tuple[Tensor, Tensor]:
    """The x with g(x) = x, where g(x)_i depends only on the x_j before i in some order, and what else g gives there.

    `step` maps x `(*, D)` to `(g(x), aux)` and closes over parameters; `aux` has any shape, and does not depend on the
    last variable either. The sweeps x <- g(x) leave the first k variables exact after k of them, whatever `start` is,
    so that `max_sweeps` = D is always enough; they end when nothing changes any more, which happens much earlier where
    the variables depend on each other weakly. `start` may have fewer batch dimensions than g(x).

    x and aux are differentiable in all that `step` closes over. With A = ∂g/∂x and B = ∂aux/∂x, cotangents v of x and
    u of aux reach g as w = v + Aᵀw + Bᵀu, a strictly triangular fixed point again. So only one step keeps its graph,
    however many there were; the backward pass takes at most D products with it. That pass has no derivative itself,
    and raises `RuntimeError` under `create_graph=True`. Where Python may not look at values (see `may_branch_on`), all
    `max_sweeps` steps are taken in view of autograd, and derivatives of any order exist: take second ones with
    `torch.func`.

    Cost: 2 to `max_sweeps` steps, and one more with a graph. A row that is not finite holds up no other.

    Source: Song, Meng, Liao & Ermon 2021, Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving.
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
        tolerance = TOLERANCE * torch.finfo(x.dtype).eps
        root = _finite(x)
        for _ in range(max_sweeps - 1):
            x, aux = step(root)
            last, root = root, _finite(x)
            if bool(((root - last).abs() <= tolerance * (1 + root.abs())).all()):
                break
    if not needs_graph:
        return x, aux
    root = root.detach().requires_grad_()
    x, aux = step(root)
    return _ImplicitGradient.apply(root, x, aux, max_sweeps)  # type: ignore[no-any-return]


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
