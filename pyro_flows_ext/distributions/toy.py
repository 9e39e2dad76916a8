"""Toy data on the plane: disconnected parts, sharp edges, thin curves.

`TOYS[name]` draws points `(num, 2)`, and has the entropy -E log p in nats if it is known in closed form or by quadrature. The
entropy is the lowest achievable negative log-likelihood; the excess over it is KL(data ‖ density). `log_prob` is the density
of the data if it is simple.

References: Dinh, Sohl-Dickstein & Bengio 2017 (moons); Grathwohl et al. 2019, FFJORD (eight Gaussians, checkerboard); Durkan,
Bekasov, Murray & Papamakarios 2019, Neural Spline Flows (crescent, sine wave, abs, sign); Cornish et al. 2020 (uniforms,
annulus, lines, split Gaussian).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

LOG_2PI = math.log(2 * math.pi)


class _Noise:
    """The random numbers of one draw of `num` points, `(num)` each."""

    def __init__(self, num: int, generator: Generator | None, dtype: torch.dtype | None):
        self.num = num
        self._options: dict[str, Any] = {"generator": generator, "dtype": dtype}

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(self.num, **self._options)

    def normal(self) -> Tensor:
        return torch.randn(self.num, **self._options)

    def below(self, num: int) -> Tensor:
        """Whole numbers 0 ... num - 1, all as likely."""
        return (num * self.uniform()).floor().clamp(max=num - 1)

    def sign(self) -> Tensor:
        return 2 * self.below(2) - 1


@dataclass(frozen=True)
class Toy:
    """A distribution of points on the plane: `draw` of random numbers, `entropy` in nats if known, `density` in logs if known."""

    draw: Callable[[_Noise], tuple[Tensor, Tensor]]
    entropy: float | None
    description: str
    density: Callable[[Tensor, Tensor], Tensor] | None = None

    def sample(
        self, num: int, *, generator: Generator | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """`num` points, `(num, 2)`; reproducible by `torch.manual_seed` or a generator."""
        return torch.stack(self.draw(_Noise(num, generator, dtype)), -1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), `(*, 2)` -> `(*)`, -inf outside of the support. Raises `ValueError` where the density is not known."""
        if self.density is None:
            raise ValueError(f"log_prob: the density of {self.description!r} is not known")
        if x.dim() == 0 or x.shape[-1] != 2:
            raise ValueError(f"x: expected points of shape (*, 2), got {tuple(x.shape)}")
        return self.density(*x.unbind(-1))


# --- uniform on a set ---


def _uniform(
    area: float, inside: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    def log_prob(x: Tensor, y: Tensor) -> Tensor:
        flat = torch.full_like(x + y, -math.log(area))
        return flat.where(inside(x, y), -math.inf)

    return log_prob


def _two_uniforms(noise: _Noise) -> tuple[Tensor, Tensor]:
    return noise.sign() * noise.uniform(1, 2), noise.uniform(-1, 1)


def _in_two_uniforms(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() >= 1) & (x.abs() <= 2) & (y.abs() <= 1)


def _checkerboard(noise: _Noise) -> tuple[Tensor, Tensor]:
    column, row = noise.below(4), 2 * noise.below(2)
    row = row + column % 2
    return 2 * (column + noise.uniform()) - 4, 2 * (row + noise.uniform()) - 4


def _in_checkerboard(x: Tensor, y: Tensor) -> Tensor:
    column, row = (x / 2).floor(), (y / 2).floor()
    return ((column + row) % 2 == 0) & (x.abs() <= 4) & (y.abs() <= 4)


def _annulus(noise: _Noise) -> tuple[Tensor, Tensor]:
    radius, angle = noise.uniform(1, 4).sqrt(), noise.uniform(0, 2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


def _in_annulus(x: Tensor, y: Tensor) -> Tensor:
    radius = x.square() + y.square()
    return (radius >= 1) & (radius <= 4)


# Wide enough for float32 to hold, and so thin that a density is 25 on it: all its nats are in the width.
LINE_WIDTH = 0.01


def _two_lines(noise: _Noise) -> tuple[Tensor, Tensor]:
    return noise.sign() + LINE_WIDTH * noise.uniform(-0.5, 0.5), noise.uniform(-1, 1)


def _in_two_lines(x: Tensor, y: Tensor) -> Tensor:
    return ((x.abs() - 1).abs() <= LINE_WIDTH / 2) & (y.abs() <= 1)


# --- normal ---


def _log_normal(x: Tensor, scale: float = 1.0) -> Tensor:
    return -0.5 * (x / scale).square() - math.log(scale) - 0.5 * LOG_2PI


def _split_gaussian(noise: _Noise) -> tuple[Tensor, Tensor]:
    x, y = noise.normal(), noise.normal()
    return x + x.sign(), y


def _log_split_gaussian(x: Tensor, y: Tensor) -> Tensor:
    log_p = _log_normal(x - x.sign()) + _log_normal(y)
    return log_p.where(x.abs() >= 1, -math.inf)


# Of the circle of radius 4 and the scale .5, both divided by √2.
RADIUS, SCALE = 4 / math.sqrt(2), 0.5 / math.sqrt(2)


def _eight_gaussians(noise: _Noise) -> tuple[Tensor, Tensor]:
    angle = noise.below(8) * (math.pi / 4)
    x, y = noise.normal(), noise.normal()
    return RADIUS * angle.cos() + SCALE * x, RADIUS * angle.sin() + SCALE * y


def _log_eight_gaussians(x: Tensor, y: Tensor) -> Tensor:
    terms = []
    for k in range(8):
        cos, sin = math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)
        terms.append(_log_normal(x - RADIUS * cos, SCALE) + _log_normal(y - RADIUS * sin, SCALE))
    return torch.stack(terms).logsumexp(0) - math.log(8)


# --- x ~ N(0, 1), y ~ N(curve(x), scale²): the entropy is that of two normals, log(2πe) + log scale ---


def _ridge(curve: Callable[[Tensor], Tensor], log_scale: float, description: str) -> Toy:
    scale = math.exp(log_scale)

    def draw(noise: _Noise) -> tuple[Tensor, Tensor]:
        x = noise.normal()
        return x, curve(x) + scale * noise.normal()

    def log_prob(x: Tensor, y: Tensor) -> Tensor:
        return _log_normal(x) + _log_normal(y - curve(x), scale)

    return Toy(draw, 1 + LOG_2PI + log_scale, description, log_prob)


# --- half circles ---

MOON_NOISE = 0.1


def _moons(noise: _Noise) -> tuple[Tensor, Tensor]:
    angle, lower = noise.uniform(0, math.pi), noise.below(2) == 1
    x = torch.where(lower, 1 - angle.cos(), angle.cos()) - 0.5
    y = torch.where(lower, 0.5 - angle.sin(), angle.sin()) - 0.25
    return x + MOON_NOISE * noise.normal(), y + MOON_NOISE * noise.normal()


def _log_moons(x: Tensor, y: Tensor) -> Tensor:
    # The mean of a normal along the arcs; its steps of π / 100 are a third of the noise, for which midpoints are exact.
    steps = 100
    angle = (torch.arange(steps, dtype=x.dtype, device=x.device) + 0.5) * (math.pi / steps)
    x, y = (x + 0.5).unsqueeze(-1), (y + 0.25).unsqueeze(-1)
    upper = _log_normal(x - angle.cos(), MOON_NOISE) + _log_normal(y - angle.sin(), MOON_NOISE)
    lower = _log_normal(x - 1 + angle.cos(), MOON_NOISE)
    lower = lower + _log_normal(y - 0.5 + angle.sin(), MOON_NOISE)
    return torch.cat([upper, lower], -1).logsumexp(-1) - math.log(2 * steps)


TOYS = {
    "two-uniforms": Toy(
        _two_uniforms, math.log(4), "two rectangles", _uniform(4, _in_two_uniforms)
    ),
    "checkerboard": Toy(
        _checkerboard, math.log(32), "eight squares of a board", _uniform(32, _in_checkerboard)
    ),
    "annulus": Toy(
        _annulus,
        math.log(3 * math.pi),
        "a ring with sharp edges",
        _uniform(3 * math.pi, _in_annulus),
    ),
    "two-lines": Toy(
        _two_lines,
        math.log(4 * LINE_WIDTH),
        "two parallel lines of width .01",
        _uniform(4 * LINE_WIDTH, _in_two_lines),
    ),
    "split-gaussian": Toy(
        _split_gaussian, 1 + LOG_2PI, "a normal cut in two halves", _log_split_gaussian
    ),
    "eight-gaussians": Toy(
        _eight_gaussians, 2.8316, "eight normals on a circle", _log_eight_gaussians
    ),
    "moons": Toy(_moons, 1.0075, "two half circles, interleaved", _log_moons),
    "crescent": _ridge(lambda x: 0.5 * x.square() - 1, -1.0, "a parabola"),
    "sine-wave": _ridge(lambda x: (5 * x).sin(), -1.0, "a sine wave"),
    "abs": _ridge(lambda x: x.abs() - 1, -1.5, "an absolute value"),
    "sign": _ridge(lambda x: x + x.sign(), -1.5, "a step and a slope"),
}
