"""Fixed-step Runge-Kutta with forward sensitivities: an ODE inside a log joint, cheap at many particles.

A graph of some thousand small operations costs many times the arithmetic; so the steps run in NumPy, the state together
with its derivatives by every input, and autograd sees one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Array = np.ndarray[Any, Any]
# (i, (1 + P, S, B)) -> its derivative at times[i]. Row 0 is the state, row 1 + p its derivative by input p; or there is only row 0.
Field = Callable[[int, Array], Array]

# Relative step of central differences: the cube root of the rounding error.
STEP = 1e-5


@dataclass(frozen=True)
class Problem:
    """`start`: inputs `(P, B)` and times `(T)` -> the initial `(1 + P, S, B)` and the field for them.

    RK4 goes from each point of `grid` to the next; the field is asked at those points and between them. The solution is
    wanted at `grid[stops]`.
    """

    start: Callable[[Array, Array], tuple[Array, Field]]
    grid: Array
    stops: Array


def solve(problem: Problem, inputs: Tensor) -> Tensor:
    """States at the stops, `(*, P)` -> `(*, stops, S)`, with exact gradients.

    NaN, with gradient zero, for the particles whose solution or its derivative is not finite at one of the stops. Second
    derivatives are central differences of the first, good to about nine digits; there are no third.
    """
    return _Solve.apply(problem, inputs)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, inputs: Tensor) -> Tensor:
        states, jacobian = _integrate(problem, inputs, bool(ctx.needs_input_grad[-1]))
        ctx.problem = problem
        ctx.save_for_backward(inputs, jacobian)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        inputs, jacobian = ctx.saved_tensors
        return None, _Pullback.apply(ctx.problem, jacobian, inputs, gradient)


class _Pullback(torch.autograd.Function):
    """Jᵀ g for the Jacobian J at the inputs."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, jacobian: Tensor, inputs: Tensor, gradient: Tensor
    ) -> Tensor:
        ctx.problem = problem
        ctx.save_for_backward(jacobian, inputs, gradient)
        return _pull(jacobian, gradient)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[None, None, Tensor, Tensor]:  # type: ignore[override]
        jacobian, inputs, gradient = ctx.saved_tensors
        by_gradient = (jacobian * v[..., None, None]).sum(-3)
        # Second derivatives commute: what v pulls back through Jᵀ g is the derivative of Jᵀ g along v.
        ratio = (v / inputs).abs().amax(-1, keepdim=True)
        h = STEP / ratio.clamp(min=1e-30)
        _, ahead = _integrate(ctx.problem, inputs + h * v, True)
        _, behind = _integrate(ctx.problem, inputs - h * v, True)
        return None, None, _pull(ahead - behind, gradient) / (2 * h), by_gradient


def _pull(jacobian: Tensor, gradient: Tensor) -> Tensor:
    return (jacobian * gradient.unsqueeze(-3)).sum((-2, -1))


def _integrate(problem: Problem, inputs: Tensor, with_jacobian: bool) -> tuple[Tensor, Tensor]:
    """States `(*, stops, S)` and Jacobian `(*, P, stops, S)`, with P = 0 if it is not wanted."""
    columns = inputs.detach().reshape(-1, inputs.shape[-1]).T.contiguous().double().cpu().numpy()
    grid = problem.grid
    times = np.empty(2 * len(grid) - 1)
    times[::2], times[1::2] = grid, (grid[1:] + grid[:-1]) / 2
    with np.errstate(all="ignore"):
        w, field = problem.start(columns, times)
        solution = _rk4(field, w if with_jacobian else w[:1], np.diff(grid), problem.stops)
    solution = solution.transpose(3, 1, 0, 2)  # B, 1 + P, stops, S
    finite = np.isfinite(solution).all((1, 2, 3), keepdims=True)
    states = torch.from_numpy(np.where(finite, solution, np.nan)[:, 0]).to(inputs)
    jacobian = torch.from_numpy(np.where(finite, solution, 0.0)[:, 1:]).to(inputs)
    batch = inputs.shape[:-1]
    return states.reshape(*batch, *states.shape[1:]), jacobian.reshape(*batch, *jacobian.shape[1:])


def _rk4(field: Field, w: Array, steps: Array, stops: Array) -> Array:
    """`w` at the stops, stacked first."""
    wanted = set(stops.tolist())
    kept = [w] if 0 in wanted else []
    for i, h in enumerate(steps.tolist()):
        k1 = field(2 * i, w)
        k2 = field(2 * i + 1, w + (h / 2) * k1)
        k3 = field(2 * i + 1, w + (h / 2) * k2)
        k4 = field(2 * i + 2, w + h * k3)
        k2 += k3
        k2 *= 2
        k2 += k1
        k2 += k4
        k2 *= h / 6
        w = w + k2
        if i + 1 in wanted:
            kept.append(w)
    return np.stack(kept)


# --- the systems ---


def lotka_volterra(inputs: Tensor, years: int, steps_per_year: int = 18) -> Tensor:
    """log (u, v) at 0 ... years for inputs (alpha, beta, gamma, delta, log u_0, log v_0), `(*, 6)` -> `(*, years + 1, 2)`.

    du = (alpha - beta v) u, dv = (delta u - gamma) v. For p = log(delta u), q = log(beta v) that is dp = alpha - exp(q),
    dq = exp(p) - gamma: two inputs less, and populations stay positive.
    """
    alpha, beta, gamma, delta, log_u, log_v = inputs.unbind(-1)
    shift = torch.stack([delta, beta], -1).log()
    initial = torch.stack([log_u, log_v], -1) + shift
    grid = np.arange(years * steps_per_year + 1) / steps_per_year
    problem = Problem(_lotka_volterra, grid, np.arange(years + 1) * steps_per_year)
    rates = torch.stack([alpha, gamma], -1)
    return solve(problem, torch.cat([rates, initial], -1)) - shift.unsqueeze(-2)


def _lotka_volterra(inputs: Array, times: Array) -> tuple[Array, Field]:
    alpha, gamma, p, q = inputs
    w = np.zeros((5, 2, len(alpha)))
    w[0] = p, q
    w[3, 0] = w[4, 1] = 1.0
    constant = np.zeros_like(w)
    constant[0] = alpha, -gamma
    constant[1, 0], constant[2, 1] = 1.0, -1.0
    signs = np.array([[-1.0], [1.0]])

    def field(i: int, w: Array) -> Array:
        swapped = w[:, ::-1]
        terms = np.exp(swapped[0]) * signs
        result = terms * swapped
        result[0] = terms
        result += constant[: len(w)]
        return result

    return w, field


def michaelis_menten(
    inputs: Tensor,
    times: Array,
    dose: float,
    volume: float,
    *,
    growth: float = 0.3,
    largest: float = 0.17,
) -> Tensor:
    """Concentrations at `times` from C(0) = 0, for inputs (k_a, K_m, V_m), `(*, 3)` -> `(*, len(times), 1)`.

    dC = (dose / volume) k_a exp(-k_a t) - (V_m / volume) C / (K_m + C). Elimination saturates while C passes K_m, soon
    after 0 where that is small: steps are `growth` times t, from 1e-6 up to `largest`.
    """

    def start(p: Array, t: Array) -> tuple[Array, Field]:
        k_a, k_m, rate = p[0], p[1], p[2] / volume
        t = t[:, None]
        decay = (dose / volume) * np.exp(-t * k_a)
        absorption = np.zeros((len(t), 4, 1, len(k_a)))
        absorption[:, 0, 0] = k_a * decay
        absorption[:, 1, 0] = (1.0 - t * k_a) * decay

        def field(i: int, w: Array) -> Array:
            room = 1.0 / (k_m + w[0, 0])
            share = w[0, 0] * room
            slope = rate * room
            result = w * (slope * (share - 1.0))
            result[0, 0] = -rate * share
            if len(w) > 1:
                result[2, 0] += slope * share
                result[3, 0] -= share / volume
            result += absorption[i, : len(w)]
            return result

        return np.zeros((4, 1, len(k_a))), field

    grid = growing_grid(times, growth, largest)
    return solve(Problem(start, grid, np.searchsorted(grid, times)), inputs)


def growing_grid(times: Array, growth: float, largest: float) -> Array:
    points = [0.0, 1e-6]
    for time in times.tolist():
        while points[-1] < time:
            t = points[-1]
            step = min(growth * t, largest)
            # Two more steps at most: halves of what is left, rather than a step and a sliver.
            left = time - t
            points.append(time if left <= step else t + min(step, left / 2))
    return np.asarray(points)
