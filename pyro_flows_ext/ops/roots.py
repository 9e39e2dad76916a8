"""Roots of monotone functions: bracketed Newton, with derivatives by the implicit function theorem.

A root is found without a graph and then polished by two Newton steps with a graph. One such step carries
the exact first derivative (it *is* the implicit function theorem), two carry derivatives up to the third order:
k Newton steps agree with the root to order 2^k - 1 in its parameters. Nothing here is a custom autograd function,
so roots work under `torch.func`, `torch.compile(fullgraph=True)` and double backward alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linalg import matvec

ValueAndSlope = Callable[[Tensor], tuple[Tensor, Tensor]]

MAX_STEPS = 200
# Steps taken where no value may be looked at (compiled graphs, meta and fake tensors). Bisection alone would need half
# the bits of the mantissa, 26 in float64. Newton on p + k tanh(p) = q from the start chosen in `_tanh_root`, with the
# two steps of the polish, is exact to rounding after 10 for 1 + k >= 1e-3 and k up to 1e6.
FIXED_STEPS = 32
TANH_STEPS = 12
# Doublings of a bracket: to 2⁶⁴, beyond what float32 data hold, and where no value may be looked at to 2¹².
MAX_DOUBLINGS = 64
FIXED_DOUBLINGS = 12


def may_branch_on(x: Tensor) -> bool:
    """Whether Python can branch on the values of `x`: False when compiling, tracing, under vmap, on meta and fake."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type != "meta"
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not _is_under_dispatch_mode()
        and not torch.jit.is_tracing()
    )


def _is_under_dispatch_mode() -> bool:
    try:  # private, so imported here: a rename must not break the import of this package
        from torch.utils._python_dispatch import _get_current_dispatch_mode
    except ImportError:
        return False
    return _get_current_dispatch_mode() is not None


def monotone_root(
    f: ValueAndSlope, lower: Tensor, upper: Tensor, *, start: Tensor | None = None
) -> Tensor:
    """Returns the root x of an increasing scalar function, elementwise: f(x) = 0 with lower <= x <= upper.

    Newton steps that leave the bracket, or that do not halve the residual, are replaced by bisection, so that
    convergence needs monotonicity alone. Cost: 3 to 10 evaluations of `f` as a rule, plus two with a graph.

    Args:
        f: x `(*)` -> value and slope, `(*)` each. It closes over its parameters, and the root is differentiable in them
            to third order.
        lower, upper: the bracket, `(*)`.
        start: the first iterate; the middle of the bracket by default.

    Example:
        >>> monotone_root(lambda x: (x**3 - 8, 3 * x**2), torch.zeros(()), torch.tensor(9.0))
        tensor(2.)
    """
    with torch.no_grad():
        x = bracketed_newton(f, lower, upper, (lower + upper) / 2 if start is None else start)
    return newton_polish(f, x)


def increasing_root(f: ValueAndSlope, start: Tensor) -> Tensor:
    """Returns the root of an increasing function of the whole real line, elementwise.

    As `monotone_root`, with a bracket around `start` that doubles until the sign changes. Where Python cannot branch on
    values (see `may_branch_on`), the bracket reaches 2¹² to either side.

    Args:
        f: x `(*)` -> value and slope, `(*)` each.
        start: the first iterate, `(*)`.

    Example:
        >>> increasing_root(lambda x: (x**3 + x - 1010, 3 * x**2 + 1), torch.zeros(()))
        tensor(10.)
    """
    with torch.no_grad():
        lower, upper = _expand_bracket(f, start)
        x = bracketed_newton(f, lower, upper, start)
    return newton_polish(f, x)


def _expand_bracket(f: ValueAndSlope, start: Tensor) -> tuple[Tensor, Tensor]:
    eager = may_branch_on(start)
    lower, upper = start - 1, start + 1
    for doubling in range(MAX_DOUBLINGS if eager else FIXED_DOUBLINGS):
        # NaN counts as enclosed: it must not keep its neighbours in the loop.
        too_high, too_low = f(lower)[0] > 0, f(upper)[0] < 0
        if eager and not bool((too_high | too_low).any()):
            break
        width = 2.0 ** (doubling + 1)
        lower = torch.where(too_high, start - width, lower)
        upper = torch.where(too_low, start + width, upper)
    return lower, upper


def newton_polish(f: ValueAndSlope, root: Tensor) -> Tensor:
    """Two Newton steps from a (nearly) exact root: full precision, and exact derivatives to third order."""
    x = root.detach()
    for _ in range(2):
        value, slope = f(x)
        x = x - value / slope
    return x


@torch.no_grad()
def bracketed_newton(
    f: ValueAndSlope,
    lower: Tensor,
    upper: Tensor,
    start: Tensor,
) -> Tensor:
    """A root to the square root of machine precision, which two Newton steps then square twice."""
    tolerance = torch.finfo(start.dtype).eps ** 0.5
    x, last = start, torch.full_like(start, torch.inf)
    for step in range(MAX_STEPS):
        value, slope = f(x)
        lower = torch.where(value < 0, x, lower)
        upper = torch.where(value > 0, x, upper)
        newton = x - value / slope
        close = (newton - x).abs() <= tolerance * (1 + x.abs())
        inside = (newton >= lower) & (newton <= upper) & (value.abs() < 0.5 * last)
        x = torch.where(close | inside, newton, (lower + upper) / 2)
        last = value.abs()
        # Asked of the value, not of the bracket: `f` may close over batched tensors where the bracket has none. One that
        # is not finite never becomes close, and must not keep its neighbours in the loop.
        if may_branch_on(value):
            if bool((close | ~value.isfinite()).all()):
                break
        elif step + 1 == FIXED_STEPS:
            break
    return x


def tanh_root(k: Tensor, q: Tensor) -> Tensor:
    """Returns the root p of p + k tanh(p) = q, elementwise: the inverse of a planar layer (k = wᵀû, q = wᵀy + b).

    The root is unique, since the slope is at least min(1, 1 + k).

    Args:
        k: `(*)`, above -1.
        q: `(*)`, broadcast against k.

    Example:
        >>> tanh_root(torch.tensor(0.0), torch.tensor(1.5))
        tensor(1.5000)
    """
    return newton_polish(_tanh_equation(k, q), _tanh_root(k, q))


def triangular_tanh_root(K: Tensor, q: Tensor) -> Tensor:
    """Returns the root p of p + K tanh(p) = q for upper-triangular K, by back-substitution.

    This inverts a Sylvester layer in its M hidden units (K = R̃R, q = R̃Qᵀy + b). Cost: M scalar roots one after the
    other, then two triangular solves.

    Args:
        K: `(*, M, M)`, upper triangular with K_ii > -1.
        q: `(*, M)`, broadcast against K.

    Returns:
        `(*, M)`, differentiable to third order.

    Example:
        >>> triangular_tanh_root(torch.zeros(2, 2), torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    with torch.no_grad():
        diagonal = K.diagonal(dim1=-2, dim2=-1)
        p: list[Tensor] = []  # from the last unit to the first
        h: list[Tensor] = []
        for i in reversed(range(K.shape[-1])):
            rest = q[..., i]
            if h:
                rest = rest - (K[..., i, i + 1 :] * torch.stack(h[::-1], -1)).sum(-1)
            p.append(_tanh_root(diagonal[..., i], rest))
            h.append(p[-1].tanh())
        root = torch.stack(p[::-1], -1)

    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    # As in `newton_polish`, with the triangular Jacobian I + K diag(sech²(p)) for the slope.
    for _ in range(2):
        h_all = root.tanh()
        residual = root + matvec(K, h_all) - q
        jacobian = eye + K * (1 - h_all**2).unsqueeze(-2)
        root = root - torch.linalg.solve_triangular(
            jacobian, residual.unsqueeze(-1), upper=True
        ).squeeze(-1)
    return root


def _tanh_equation(k: Tensor, q: Tensor) -> ValueAndSlope:
    def f(p: Tensor) -> tuple[Tensor, Tensor]:
        h = p.tanh()
        return p + k * h - q, 1 + k * (1 - h**2)

    return f


@torch.no_grad()
def _tanh_root(k: Tensor, q: Tensor) -> Tensor:
    # The equation is odd in (p, q), so solve for |q|. For p >= 0, tanh p lies below both p and 1, so |q| / (1 + k) and
    # |q| - k bound the root from below for k > 0 and from above for k < 0; from the nearer one Newton is monotone,
    # because p + k tanh p is concave (k > 0) or convex (k < 0) there, and needs no bracket.
    a = q.abs()
    linear, saturated = a / (1 + k), a - k
    p = torch.where(k > 0, torch.maximum(linear, saturated), torch.minimum(linear, saturated))
    eager = may_branch_on(p)
    tolerance = torch.finfo(p.dtype).eps ** 0.5
    f = _tanh_equation(k, a)
    for _ in range(MAX_STEPS if eager else TANH_STEPS):
        value, slope = f(p)
        step = value / slope
        p = p - step
        # Written so that NaN, which never comes close to anything, does not keep its neighbours in the loop.
        if eager and not bool((step.abs() > tolerance * (1 + p)).any()):
            break
    return p.copysign(q)
