"""Three affine couplings come as near to any target as one likes, and as near to singular (Koehler, Mehta & Risteski 2021).

A map φ = (a, b) takes uniform z in the unit square to the target, here two noisy half circles. With lattices of width δ:

    w = δ z2 + δ ⌊z1 / δ⌋                      both numbers in one: z1 to within δ, and z2
    v = δ³ z1 + δ ⌊a / δ⌋ + δ c w              a to within δ, and w inside of the cell
    y = δ w + b                                b of the numbers that v still holds

Each line scales by a constant and shifts by a function of what passes: an affine coupling. (v, y) is within O(δ) of φ(z) but for
a share O(δ) of the square, and that distance, for the same z, bounds the Wasserstein distance W2 to the target. The log-det is
5 log δ everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from depth_training import COLORS
from torch import Tensor, nn

from pyro_flows_ext.transforms import ComposeFlow, Coupling, Transformer

WIDTHS = tuple(1 / n for n in (4, 10, 32, 100, 320))  # whole cells on either half circle


class Affine(Transformer):
    """y = exp(s) x + t, without the bound on s of the package's own."""

    num_params = 2

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, t = theta.unbind(-2)
        return torch.exp(s) * x + t, s.expand_as(x)

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        s, t = theta.unbind(-2)
        return torch.exp(-s) * (y - t), -s.expand_as(y)


class Shift(nn.Module):
    """(log scale, shift(x)) of one coupling of two numbers."""

    def __init__(self, scale: float, shift: Callable[[Tensor], Tensor]):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x, math.log(self.scale)), self.shift(x)], -1)


def target(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """φ: two interleaved half circles, z1 along them and z2 across, a tenth wide on either side."""
    upper = z1 < 0.5
    angle = 2 * torch.pi * (z1 % 0.5)
    radius = 1 + 0.2 * (z2 - 0.5)
    a, b = radius * angle.cos(), radius * angle.sin()
    return torch.where(upper, a - 0.5, 0.5 - a), torch.where(upper, b - 0.25, 0.25 - b)


def couplings(delta: float) -> ComposeFlow:
    """The three couplings of lattice width δ."""
    code = (1 - delta**2) / (1 + delta)

    def split(w: Tensor) -> tuple[Tensor, Tensor]:
        return delta * ((w / delta).floor() + 0.5), w / delta % 1

    def middle(w: Tensor) -> Tensor:
        a, _ = target(*split(w))
        return delta * (a / delta).floor() + delta * code * w

    def last(v: Tensor) -> Tensor:
        _, b = target(*split(v / delta % 1 / code))
        return b

    def coupling(scale: float, shift: Callable[[Tensor], Tensor], flip: bool) -> Coupling:
        return Coupling(2, transformer=Affine(), mask="half", flip=flip, net=Shift(scale, shift))

    return ComposeFlow(
        [
            coupling(delta, lambda x: delta * (x / delta).floor(), False),
            coupling(delta**3, middle, True),
            coupling(delta, last, False),
        ]
    )


def run(seeds: int, quick: bool) -> list[dict]:
    """One row for each width: the bound on W2, and singular values; prints them. Nothing is trained."""
    num, rows = 2000 if quick else 20_000, []
    for delta in WIDTHS:
        flow = couplings(delta)
        for seed in range(seeds):
            torch.manual_seed(seed)
            z = torch.rand(num, 2, dtype=torch.float64, requires_grad=True)
            y, ladj = flow.forward_and_ladj(z)
            J = torch.stack([torch.autograd.grad(y[:, k].sum(), z, retain_graph=True)[0] for k in (0, 1)], 1)  # fmt: skip
            sigma = torch.linalg.svdvals(J)
            off = (y.detach() - torch.stack(target(*z.detach().T), -1)).square().sum(-1).mean()
            rows.append({"delta": delta, "seed": seed, "w2": off.sqrt().item(), "smallest": sigma[:, 1].median().item(), "least": sigma[:, 1].min().item(), "largest": sigma[:, 0].median().item(), "ladj error": (ladj - 5 * math.log(delta)).abs().max().item()})  # fmt: skip
        row = rows[-1]
        print(
            f"δ = 1/{1 / delta:<4.0f} W2 <= {row['w2']:.4f}   smallest singular value, median {row['smallest']:.1e}, least "
            f"{row['least']:.1e}   largest, median {row['largest']:.2f}",
            flush=True,
        )
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """W2 against the smallest singular value, and draws at three widths beside the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.4), layout="constrained")
    ax, *panels = figure.subplots(1, 5)
    first = [r for r in rows if r["seed"] == 0]
    x, y = [r["smallest"] for r in first], [r["w2"] for r in first]
    ax.plot(x, y, "o-", color=COLORS[0], markersize=3)
    ax.set(xscale="log", yscale="log", xlabel="smallest singular value", ylabel="bound on W2")
    ax.spines[["top", "right"]].set_visible(False)
    torch.manual_seed(0)
    z = torch.rand(4000, 2, dtype=torch.float64)
    shown = [
        (f"δ = 1/{1 / delta:.0f}", couplings(delta).forward_and_ladj(z)[0]) for delta in WIDTHS[:3]
    ]
    for panel, (title, points) in zip(
        panels, [*shown, ("target", torch.stack(target(*z.T), -1))], strict=True
    ):
        panel.scatter(*points.T.numpy(), s=0.3, color=COLORS[3])
        panel.set_title(title, fontsize=9)
        panel.set(xticks=[], yticks=[], xlim=(-2, 2), ylim=(-1.5, 1.5))
    figure.savefig(path, dpi=110)
