"""L-BFGS ascents from many starts at once, one evaluation of the target a step for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

# Pairs of steps and changes of the gradient that are remembered.
HISTORY = 6
MAX_EVALUATIONS = 200
# Weak Wolfe conditions: a step gains this share of what its slope promises, and leaves at most this share of the slope.
SUFFICIENT_GAIN, SUFFICIENT_FLATTENING = 1e-4, 0.9
MAX_TRIALS = 15
# When more than half of the ascents are done, the others go on for this share of the evaluations so far, and at least for
# so many.
PATIENCE, LEAST_PATIENCE = 0.25, 20
# A mode is reached when so many steps in a row, and what the quadratic model promises of the next, are worth less than
# TOLERANCE nats each.
TOLERANCE, LEVEL_STEPS = 1e-4, 3


@dataclass(frozen=True)
class Path:
    """The points of one ascent `(T, D)`, their log-densities `(T)` and gradients `(T, D)`, in order of ascent.

    `converged` is False where the budget ended first or the line search failed, as in a funnel without a maximum.
    """

    points: Tensor
    values: Tensor
    gradients: Tensor
    converged: bool

    @property
    def end(self) -> Tensor:
        return self.points[-1]


@torch.no_grad()
def climb(
    target: ValueAndGradient, starts: Tensor, *, max_evaluations: int = MAX_EVALUATIONS
) -> list[Path]:
    """One L-BFGS ascent from each row of `starts` `(N, D)`.

    Every row has its own memory and its own line search (bracketing to the weak Wolfe conditions), and each call of
    `target` evaluates one trial point for all rows that are not done. A model that runs many particles at once makes N
    ascents for the price of the longest. Points of no density end a trial, not an ascent; a start without density gives
    a path of no points.

    References:
        Liu & Nocedal 1989, On the limited memory BFGS method for large scale optimization.
        Lewis & Overton 2013, Nonsmooth optimization via quasi-Newton methods (the line search).
    """
    state = _Ascents(target, starts)
    count, limit = 1, max_evaluations
    while count < limit and bool(state.active.any()):
        state.advance()
        count += 1
        if limit == max_evaluations and 2 * int(state.active.sum()) < len(starts):
            limit = min(limit, count + max(LEAST_PATIENCE, int(PATIENCE * count)))
    return state.paths()


class _Ascents:
    """The state of all ascents; `advance` evaluates one trial point for each that is not done."""

    def __init__(self, target: ValueAndGradient, starts: Tensor):
        self.target = target
        N, D = starts.shape
        self.x = starts.clone()
        self.f, self.g = target(self.x)
        self.active = self.f.isfinite()
        self.converged = torch.zeros_like(self.active)
        # Steps and changes of the gradient, the oldest first; a pair of zeros has no effect.
        self.S, self.Y = (starts.new_zeros(N, HISTORY, D) for _ in range(2))
        self.gamma = starts.new_zeros(N)
        self.resolution = torch.finfo(starts.dtype).eps
        self.record: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [
            (self.active.clone(), self.x.clone(), self.f.clone(), self.g.clone())
        ]
        self.d, self.slope = torch.zeros_like(self.x), torch.zeros_like(self.f)
        self.low, self.high, self.t = (torch.zeros_like(self.f) for _ in range(3))
        self.trials, self.num_level = (torch.zeros_like(self.f, dtype=torch.long) for _ in range(2))
        self.best = (self.x, self.f, self.g)
        self._new_direction(torch.ones_like(self.active))

    # --- directions ---

    def _direction(self) -> Tensor:
        """H g in the compact form of L-BFGS; g / max(1, |g|) for a row without memory."""
        S, Y, g = self.S, self.Y, self.g
        inner = S @ Y.mT  # (N, m, m), the oldest pair first
        curvature = inner.diagonal(dim1=-2, dim2=-1)
        # A pair of zeros gets a unit diagonal, which decouples it.
        R = inner.triu() + torch.diag_embed((curvature == 0).to(g))
        gamma = self.gamma.unsqueeze(-1)
        along_s = (S @ g.unsqueeze(-1)).squeeze(-1)
        along_y = (Y @ g.unsqueeze(-1)).squeeze(-1)
        u = torch.linalg.solve_triangular(R, along_s.unsqueeze(-1), upper=True).squeeze(-1)
        middle = curvature * u + gamma * ((Y @ Y.mT) @ u.unsqueeze(-1)).squeeze(-1)
        v = torch.linalg.solve_triangular(
            R.mT, (middle - gamma * along_y).unsqueeze(-1), upper=False
        ).squeeze(-1)
        memory = gamma * g + (
            S.mT @ v.unsqueeze(-1) - gamma.unsqueeze(-1) * (Y.mT @ u.unsqueeze(-1))
        ).squeeze(-1)
        steepest = g / g.norm(dim=-1, keepdim=True).clamp(min=1.0)
        return torch.where(gamma > 0, memory, steepest)

    def _new_direction(self, rows: Tensor) -> None:
        """Begins a line search in these rows."""
        d = self._direction()
        self.d = torch.where(rows.unsqueeze(-1), d, self.d)
        self.slope = torch.where(rows, (self.g * d).sum(-1), self.slope)
        self.low = torch.where(rows, 0.0, self.low)
        self.high = torch.where(rows, torch.inf, self.high)
        self.t = torch.where(rows, 1.0, self.t)
        self.trials = torch.where(rows, 0, self.trials)
        self.best = _where(rows, (self.x, self.f, self.g), self.best)

    # --- one evaluation ---

    def advance(self) -> None:
        # Rows that are done keep their place and are not evaluated.
        index = self.active.nonzero().squeeze(-1)
        trial = self.x + self.t.unsqueeze(-1) * self.d
        f, g = self.f.clone(), self.g.clone()
        f[index], g[index] = self.target(trial[index])
        self.trials = self.trials + 1
        promised = SUFFICIENT_GAIN * self.t * self.slope
        rises = f.isfinite() & (f >= self.f + promised)
        steep = (g * self.d).sum(-1) > SUFFICIENT_FLATTENING * self.slope
        accepted = self.active & rises & ~steep
        # A step that rises and is too short becomes the lower end of the bracket, one that does not rise the upper end.
        longer, shorter = self.active & rises & steep, self.active & ~rises
        self.best = _where(longer, (trial, f, g), self.best)
        self.low = torch.where(longer, self.t, self.low)
        self.high = torch.where(shorter, self.t, self.high)
        t = torch.where(self.high.isinf(), 4 * self.t, self._inside(f))
        self.t = torch.where(longer | shorter, t, self.t)
        exhausted = self.active & ~accepted & (self.trials >= MAX_TRIALS)
        end = _where(accepted, (trial, f, g), self.best)
        self._finish_step(accepted | (exhausted & (self.low > 0)), end)
        self._give_up(exhausted & (self.low == 0))

    def _inside(self, f: Tensor) -> Tensor:
        """A trial step within the bracket: by the parabola through two values and a slope where it is the first."""
        middle = (self.low + self.high) / 2
        fall = self.f + self.t * self.slope - f
        vertex = self.slope * self.t.square() / (2 * fall)
        inside = (
            (self.low == 0) & vertex.isfinite() & (vertex > 0.1 * self.high) & (vertex < middle)
        )
        # Without a finite value there is no parabola; the wall may be near the start.
        middle = torch.where(f.isfinite() | (self.low > 0), middle, 0.1 * self.high)
        return torch.where(inside, vertex, middle)

    def _finish_step(self, rows: Tensor, end: tuple[Tensor, Tensor, Tensor]) -> None:
        if not bool(rows.any()):
            return
        x, f, g = end
        s, y = x - self.x, self.g - g
        curvature, size = (s * y).sum(-1), y.square().sum(-1)
        valid = curvature > self.resolution * size
        # A pair without curvature of the right sign is not remembered.
        keep = rows & valid
        self.S, self.Y = (
            torch.where(keep[:, None, None], torch.cat([old[:, 1:], new.unsqueeze(1)], 1), old)
            for old, new in ((self.S, s), (self.Y, y))
        )
        self.gamma = torch.where(keep, curvature / torch.where(valid, size, 1.0), self.gamma)
        gain = f - self.f
        # Differences below the rounding of the value itself are no gain.
        tolerance = TOLERANCE + 4 * self.resolution * f.abs()
        self.x, self.f, self.g = _where(rows, end, (self.x, self.f, self.g))
        self.record.append((rows, self.x, self.f, self.g))
        self._new_direction(rows)
        # The slope along the next step is twice what the quadratic model promises of it.
        small = (gain < tolerance) & (self.slope < 2 * tolerance)
        self.num_level = torch.where(
            rows, torch.where(small, self.num_level + 1, 0), self.num_level
        )
        # No slope at all is that of a maximum, to rounding.
        level = rows & ((self.num_level >= LEVEL_STEPS) | (self.slope.abs() <= self.resolution))
        self.converged = self.converged | level
        self.active = self.active & ~level & torch.where(rows, self.slope > 0, True)

    def _give_up(self, rows: Tensor) -> None:
        """A failed line search: once more along the gradient, without memory; a row that had none is done."""
        if not bool(rows.any()):
            return
        fresh = rows & (self.gamma > 0)
        self.active = self.active & ~(rows & ~fresh)
        self.S, self.Y = (
            torch.where(fresh[:, None, None], 0.0, memory) for memory in (self.S, self.Y)
        )
        self.gamma = torch.where(fresh, 0.0, self.gamma)
        self._new_direction(fresh)

    def paths(self) -> list[Path]:
        rows, points, values, gradients = (
            torch.stack(part, 1) for part in zip(*self.record, strict=True)
        )
        return [
            Path(points[i, keep], values[i, keep], gradients[i, keep], bool(self.converged[i]))
            for i, keep in enumerate(rows)
        ]


def _where(
    rows: Tensor, yes: tuple[Tensor, Tensor, Tensor], no: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Row-wise choice between two triples of points, values and gradients."""
    x, f, g = (
        torch.where(rows.unsqueeze(-1) if a.dim() > 1 else rows, a, b)
        for a, b in zip(yes, no, strict=True)
    )
    return x, f, g
