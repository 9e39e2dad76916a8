"""The distinct modes at which ascents end, with their Laplace masses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .climb import Path
from .gaussian import Gaussian
from .laplace import laplace
from .pathfinder import quadratics
from .target import MeasuredTarget

# Two ends closer than this many standard deviations of the curvature there are one mode, and so are two between which
# the log joint does not fall by this many nats on a straight line of so many points.
SAME_MODE, LEAST_DIP, LINE_POINTS = 1.0, 0.5, 15
# Newton's method ends where its next step is worth less than this, in nats.
NEWTON_STEPS, ARRIVED = 5, 1e-3
# After so many ascents that lead to no mode, others are not tried.
MAX_FAILURES = 3


@dataclass(frozen=True)
class Mode:
    """A maximum of the log joint over unconstrained space.

    Attributes:
        loc: the maximum `(D)`.
        log_joint: the log joint there, in nats.
        log_mass: the log of the mass of the Gaussian with the curvature there, log_joint + log ∫ exp(-½ ...). Differences
            between modes estimate the log of their posterior odds.
        num_climbs: how many ascents ended there.
    """

    loc: Tensor = field(repr=False)
    log_joint: float
    log_mass: float
    num_climbs: int


@dataclass(frozen=True)
class _Found:
    end: Tensor
    value: Tensor
    gaussian: Gaussian
    count: int = 1

    @property
    def log_mass(self) -> float:
        volume = self.gaussian.dim / 2 * math.log(2 * math.pi) + float(self.gaussian.log_det)
        return float(self.value) + volume


def distinct_modes(
    target: MeasuredTarget, paths: Sequence[Path], *, with_hessian: bool
) -> tuple[list[Mode], list[Gaussian]]:
    """The modes at which the paths end, by descending mass, and a Gaussian at each.

    Newton's method goes on from where an ascent ended, and where it does not arrive there is no mode: densities such as
    funnels have no maximum. Where Hessians are too dear, the ends of converged ascents are modes, with the curvature that
    L-BFGS estimated on its way.
    """
    found: list[_Found] = []
    failures = 0
    ended = (p for p in paths if len(p.points) and (with_hessian or p.converged))
    for path in sorted(ended, key=lambda p: -float(p.values[-1])):
        for i, known in enumerate(found):
            if _is_same(target, path, known):
                found[i] = replace(known, count=known.count + 1)
                break
        else:
            mode = _newton(target, path) if with_hessian else _by_path(path)
            if mode is not None:
                found.append(mode)
            failures += mode is None
        if failures == MAX_FAILURES:
            break
    found.sort(key=lambda mode: -mode.log_mass)
    modes = [Mode(f.end.to(target.dtype), float(f.value), f.log_mass, f.count) for f in found]
    return modes, [f.gaussian for f in found]


def _is_same(target: MeasuredTarget, path: Path, known: _Found) -> bool:
    step = path.end - known.end
    if known.gaussian.unscale(step).norm() < SAME_MODE:
        return True
    share = torch.linspace(0, 1, LINE_POINTS + 2)[1:-1].to(step).unsqueeze(-1)
    lower = torch.minimum(path.values[-1], known.value)
    return bool((target(known.end + share * step) > lower - LEAST_DIP).all())


def _newton(target: MeasuredTarget, path: Path) -> _Found | None:
    """The mode by Newton's method from the end of the path, and the Laplace approximation there.

    None where that is not reached in a few steps: the ascent crept along a ridge and did not arrive.
    """
    u, value, gradient = path.end, path.values[-1], path.gradients[-1]
    for _ in range(NEWTON_STEPS):
        gaussian = laplace(target.hessian(u), u)
        if gaussian is None:
            return None
        whitened = gaussian.pull_back(gradient)
        if whitened.square().sum() / 2 < ARRIVED:
            return _Found(u, value, gaussian)
        u = gaussian.draw(whitened)
        values, gradients = target.value_and_gradient(u.unsqueeze(0))
        if not values[0] > value:
            return None
        value, gradient = values[0], gradients[0]
    return None


def _by_path(path: Path) -> _Found | None:
    candidates = quadratics(path)
    return _Found(path.end, path.values[-1], candidates[-1]) if candidates else None
