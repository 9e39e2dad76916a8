"""Inverses of y = x + g(x) for a contraction g: accelerated, never slower than x <- y - g(x), differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .linalg import matvec
from .roots import may_branch_on
from .trace import Linearizable, dense_jacobian

# Up to this dimension a Jacobian costs little, and Newton's method needs few of them.
NEWTON_DIM = 16
# Newton steps where no value may be looked at. Trained networks, and random ones, need 3 to 6; the worst found, with one
# layer whose slopes lie between -0.97 and 0.1, needs 10.
FIXED_STEPS = 10
# How often a Newton step is halved before a plain one takes its place.
HALVINGS = 5
# Number of differences that Anderson acceleration keeps.
HISTORY = 5
# A residual below this many units in the last place is zero.
TOLERANCE = 4

# x -> its residual x + g(x) - y and a step to take from there, all of them `(*, D)`.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


def contraction_inverse(g: Linearizable, y: Tensor, lipschitz: float, event_dim: int = 1) -> Tensor:
    """Returns the x with x + g(x) = y, for a contraction g.

    Events of up to 16 numbers, and all events where Python cannot branch on values (see `may_branch_on`), are solved by
    Newton's method with D x D Jacobians, with derivatives to second order. Larger events are solved by Anderson
    acceleration, with a gradient by the implicit function theorem that keeps one graph of g and has no derivative. Both
    are safeguarded by plain steps x <- y - g(x). A row that is not finite stays so, and holds up no other.

    Args:
        g: closes over parameters, in which x is differentiable.
        y: `(*, event)`.
        lipschitz: a bound on the Lipschitz constant of g, below 1. Compiled programs take ten Newton steps, enough for
            all that was tried at .97, but not closer to 1.
        event_dim: number of event dimensions.

    Raises:
        RuntimeError: if plain steps do not converge, because g is not a contraction.

    Example:
        >>> contraction_inverse(Opaque(lambda x: 0.5 * x.sin()), torch.zeros(3), 0.5)
        tensor([0., 0., 0.])
    """
    event = y.shape[y.dim() - event_dim :]
    is_small = event.numel() <= NEWTON_DIM
    if is_small or not may_branch_on(y) or forward_ad.unpack_dual(y).tangent is not None:
        return _newton(g, y, lipschitz, event_dim)
    with torch.no_grad():
        root = anderson(g, y, lipschitz, event_dim)
    x = y - g(root)
    if not x.requires_grad:
        return x
    root = root.detach().requires_grad_()
    return _ImplicitGradient.apply(root, y - g(root), lipschitz, event_dim)


def _newton(g: Linearizable, y: Tensor, lipschitz: float, event_dim: int) -> Tensor:
    """By Newton's method to the square root of machine precision, and two chord steps in view of autograd."""
    shape, y = y.shape, y.flatten(y.dim() - event_dim)
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    inverse = eye

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal inverse
        value, product = g.linearize(x.reshape(shape))
        jacobian = dense_jacobian(product, x.reshape(shape), event_dim)
        # `_ex`: one row that is not finite must not raise for all.
        inverse = torch.linalg.inv_ex(eye + jacobian).inverse
        residual = x + value.reshape(x.shape) - y
        return residual, -matvec(inverse, residual)

    with torch.no_grad():
        # The distance to the root is at most ‖residual‖ / (1 - lipschitz).
        tolerance = (1 - lipschitz) * torch.finfo(y.dtype).eps ** 0.5
        num_steps = None if may_branch_on(y) else FIXED_STEPS
        x = _solve(evaluate, y, lipschitz, tolerance, halvings=HALVINGS, num_steps=num_steps)
    # x <- x - (I + J)⁻¹ (x + g(x) - y) with a constant inverse squares the error as Newton does, starting from here. Its
    # derivative in x vanishes at the root, so that each step adds one right order to the derivatives in all else.
    x, inverse = x.detach(), inverse.detach()
    for _ in range(2):
        x = x - matvec(inverse, x + g(x.reshape(shape)).reshape(x.shape) - y)
    return x.reshape(shape)


def anderson(
    g: Callable[[Tensor], Tensor],
    y: Tensor,
    lipschitz: float,
    event_dim: int = 1,
    *,
    scale: float = 1.0,
) -> Tensor:
    """Returns the x with x + g(x) = y, without a graph: to 4 units in the last place of scale + ‖x‖, in the residual.

    Anderson acceleration (type II, five differences), in each row by itself, safeguarded by plain steps.

    Args:
        g: a map of events `(*, event)`.
        y: `(*, event)`.
        lipschitz: a bound on the Lipschitz constant of g, below 1.
        event_dim: number of event dimensions.
        scale: added to ‖x‖ in the tolerance.

    Example:
        >>> anderson(lambda x: 0.5 * x, torch.tensor([3.0]), 0.5).round(decimals=4)
        tensor([2.])

    References:
        Walker & Ni 2011, Anderson Acceleration for Fixed-Point Iterations.
    """
    shape, y = y.shape, y.flatten(y.dim() - event_dim)
    eps = torch.finfo(y.dtype).eps
    points: list[Tensor] = []
    residuals: list[Tensor] = []

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        residual = x + g(x.reshape(shape)).reshape(x.shape) - y
        points.append(x)
        residuals.append(residual)
        if len(points) == 1:
            return residual, -residual
        del points[: -HISTORY - 1], residuals[: -HISTORY - 1]
        dx, dr = torch.stack(points, -2).diff(dim=-2), torch.stack(residuals, -2).diff(dim=-2)
        # Of length one: early differences are larger than late ones by many orders, and would drown them.
        length = torch.linalg.vector_norm(dr, dim=-1, keepdim=True)
        factor = length.clamp_min(torch.finfo(y.dtype).tiny).reciprocal()
        dx, dr = dx * factor, dr * factor
        gram = dr @ dr.mT + 8 * eps * torch.eye(dr.shape[-2], dtype=y.dtype, device=y.device)
        gamma = torch.linalg.solve_ex(gram, matvec(dr, residual)).result
        return residual, -residual - matvec((dx - dr).mT, gamma)

    return _solve(evaluate, y, lipschitz, TOLERANCE * eps, scale=scale).reshape(shape)


def _solve(
    evaluate: Evaluate,
    start: Tensor,
    lipschitz: float,
    tolerance: float,
    *,
    scale: float = 1.0,
    halvings: int = 0,
    num_steps: int | None = None,
) -> Tensor:
    """The best x of each row, once all residuals are below tolerance (scale + ‖x‖), or after `num_steps`.

    The residual r(x) = x + g(x) - y after a plain step x - r(x) is at most `lipschitz` times as long as before. A step
    that does not do as well is taken back, halved a few times and then replaced by a plain one, so that being a
    contraction is all that g needs. Where even a plain step fails to shrink the residual, rounding is all that is left
    of it, and the row is finished.
    """
    x = best = start
    best_residual = best_step = torch.zeros_like(start)
    best_norm = torch.full_like(start[..., :1], torch.inf)
    length = torch.ones_like(best_norm)  # of the step that led to x
    is_plain = torch.zeros_like(best_norm, dtype=torch.bool)
    # One step of this many at least shrinks the residual by `lipschitz`.
    limit = (2 + halvings) * math.ceil(math.log(tolerance / 10) / math.log(lipschitz)) + 10
    for _ in range(limit if num_steps is None else num_steps):
        residual, step = evaluate(x)
        norm = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        is_better = norm <= lipschitz * best_norm
        best = torch.where(is_better, x, best)
        best_residual = torch.where(is_better, residual, best_residual)
        best_step = torch.where(is_better, step, best_step)
        best_norm = torch.where(is_better, norm, best_norm)
        if num_steps is None:
            size = scale + torch.linalg.vector_norm(best, dim=-1, keepdim=True)
            # A row that is not finite is never better, and so finished after a few steps.
            if bool(((best_norm <= tolerance * size) | (is_plain & ~is_better)).all()):
                break
        length = torch.where(is_better, 1.0, length / 2)
        is_plain = length < 2.0**-halvings
        x = best + torch.where(is_plain, -best_residual, length * best_step)
    if num_steps is None:
        far = best_norm.isfinite() & (best_norm > torch.finfo(x.dtype).eps ** 0.5 * size)
        if bool(far.any()):
            raise RuntimeError(
                f"x + g(x) = y: plain steps do not converge; expected a g of Lipschitz constant {lipschitz:g} at most"
            )
    return best


class _ImplicitGradient(torch.autograd.Function):
    """The identity on x = y - g(root); its backward pass adds what reaches x through the root."""

    @staticmethod
    def forward(root: Tensor, x: Tensor, lipschitz: float, event_dim: int) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        root, x, ctx.lipschitz, ctx.event_dim = inputs
        ctx.save_for_backward(root, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: it marks w, but the root too depends on the parameters, and has lost sight of them.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "contraction_inverse: this gradient cannot be differentiated again (create_graph=True); take second "
                "derivatives with torch.func, or of the forward direction"
            )
        root, x = ctx.saved_tensors

        # w + Jᵀw = v, with ∂x/∂root = -J.
        def transposed(w: Tensor) -> Tensor:
            return -torch.autograd.grad(x, root, w, retain_graph=True)[0]

        return None, anderson(transposed, v, ctx.lipschitz, ctx.event_dim, scale=0.0), None, None
