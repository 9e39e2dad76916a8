"""How many affine couplings of one fixed partition make a linear map? (Koehler, Mehta & Risteski 2021, sec. 5.)"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from depth_training import COLORS
from torch import Tensor, nn

from pyro_flows_ext.transforms import ComposeFlow, Coupling, FlowTransform, LULinear, QRLinear

# Below this mean squared error a map counts as exact: the last steps converge quadratically, and end near 1e-31.
EXACT = 1e-24
# Where the picture shows them: what lies below is rounding.
FLOOR = 1e-10


class LinearConditioner(nn.Module):
    """(W a, s) from the half a that passes, `(N, B, D / 2)`: makes a coupling linear. One W and s for each of B."""

    def __init__(self, problems: int, half: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(problems, half, half))
        self.raw_scale = nn.Parameter(scale * torch.randn(problems, half))

    def forward(self, a: Tensor) -> Tensor:
        shift = torch.einsum("bij,nbj->nbi", self.weight, a)
        return torch.cat([shift, self.raw_scale.expand_as(shift)], -1)


def one_per_problem(
    layer: FlowTransform, problems: int, scale: float
) -> tuple[FlowTransform, list[Tensor]]:
    """`layer` with a set of parameters for each problem, and these: stacked along their first dimension."""
    stacks = {
        name: (p.detach() + scale * torch.randn(problems, *p.shape)).requires_grad_()
        for name, p in layer.named_parameters()
    }
    return layer.bind(stacks), list(stacks.values())


LAYERS: dict[str, Callable[..., FlowTransform] | None] = {
    "couplings alone": None,
    "with an LU layer": LULinear,
    "with a QR layer": QRLinear,
}


def target(dim: int, seed: int) -> Tensor:
    """iid N(0, 1) entries; the first two rows swap where det < 0: scales of couplings are positive."""
    A = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A[[1, 0, *range(2, dim)]] if torch.linalg.det(A) < 0 else A


def fit(
    targets: Tensor, num_couplings: int, layer: Callable | None, restarts: int, iterations: int
) -> Tensor:
    """Mean squared error by entry of the best of `restarts` fits to each target: `(S, D, D)` -> `(S)`.

    Levenberg-Marquardt on all fits at once, from random weights of standard deviation 1 / (2 √D). They end together,
    when every target has an exact fit or all of its fits have stopped. (L-BFGS, at D = 16, is still at 1e-4 after 500
    iterations where these fits are exact.)
    """
    S, D = targets.shape[:2]
    A, scale = targets.repeat_interleave(restarts, 0), 0.5 / math.sqrt(D)
    parts: list[FlowTransform] = [
        Coupling(D, net=LinearConditioner(len(A), D // 2, scale), flip=k % 2 == 1)
        for k in range(num_couplings)
    ]
    parameters = [p for part in parts for p in part.parameters()]
    if layer is not None:
        part, more = one_per_problem(layer(D, bias=False), len(A), scale)
        parts, parameters = [*parts, part], parameters + more
    flow, identity = ComposeFlow(parts), torch.eye(D)[:, None].expand(D, len(A), D)

    def residuals() -> Tensor:
        columns = flow.forward_and_ladj(identity)[0]  # of the fitted map: (D, problems, D)
        return (columns.movedim(0, -1) - A).flatten(1)

    damping, r = torch.ones(len(A)), residuals()
    error = r.detach().square().mean(-1)
    history = [error]
    for _ in range(iterations):
        step = _damped_step(_jacobian(r, parameters), r.detach(), damping)
        steps = step.split([p[0].numel() for p in parameters], -1)
        old = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, s in zip(parameters, steps, strict=True):
                p.sub_(s.view_as(p))
            new = residuals().square().mean(-1)
            better = new < error
            for p, o in zip(parameters, old, strict=True):
                p.copy_(torch.where(better.view(-1, *[1] * (p.dim() - 1)), p, o))
        error = torch.where(better, new, error)
        damping = torch.where(better, damping / 4, damping * 4).clamp(1e-15, 1e8)
        r = residuals()
        history.append(error)
        if _is_over(history, S):
            break
    return error.view(S, restarts).amin(-1)


def _is_over(history: list[Tensor], num_targets: int) -> bool:
    """Whether every target has an exact fit, or none of its fits has gained a thousandth in the last 20 steps."""
    now, before = (
        e.view(num_targets, -1) for e in (history[-1], history[max(len(history) - 21, 0)])
    )
    is_stuck = (now > 0.999 * before).all(-1) & (len(history) > 20)
    return bool(((now.amin(-1) < EXACT) | is_stuck).all())


def _jacobian(r: Tensor, parameters: list[Tensor]) -> Tensor:
    """∂r / ∂parameters for each of B problems, of which each has its own: `(B, R, P)` for r `(B, R)`."""
    rows = []
    for basis in torch.eye(r.shape[1])[:, None].expand(-1, *r.shape).split(32):
        grads = torch.autograd.grad(r, parameters, basis, retain_graph=True, is_grads_batched=True)
        rows.append(torch.cat([grad.flatten(2) for grad in grads], -1))
    return torch.cat(rows).movedim(0, 1)


def _damped_step(J: Tensor, r: Tensor, damping: Tensor) -> Tensor:
    """(JᵀJ + λI)⁻¹ Jᵀr by the smaller of the two normal equations; λ in units of the mean eigenvalue."""
    wide = J.shape[-2] < J.shape[-1]
    H = J @ J.mT if wide else J.mT @ J
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal += (damping * diagonal.mean(-1))[:, None]
    r = r[..., None]
    step = J.mT @ torch.linalg.solve(H, r) if wide else torch.linalg.solve(H, J.mT @ r)
    return step.squeeze(-1)


def run(seeds: int, quick: bool) -> list[dict]:
    """One row for every dimension, number of couplings and linear layer; prints them."""
    dims, numbers = ((4, 8), (1, 2, 3, 4, 8)) if quick else ((4, 8, 16), (1, 2, 3, 4, 8, 16))
    iterations, restarts = (60, 2) if quick else (100, 3)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    rows = []
    try:
        for layer, make in LAYERS.items():
            for D in dims:
                targets = torch.stack([target(D, seed) for seed in range(seeds)])
                for K in numbers:
                    torch.manual_seed(0)
                    start = time.perf_counter()
                    errors = fit(targets, K, make, restarts, iterations).tolist()
                    seconds = time.perf_counter() - start
                    rows.append({"layer": layer, "D": D, "K": K, "mse": errors, "seconds": seconds})
                    shown = "  ".join(f"{e:8.1e}" for e in errors)
                    print(
                        f"{layer:16s} D={D:<3} K={K:<3} MSE {shown}   {seconds:.1f} s", flush=True
                    )
    finally:
        torch.set_default_dtype(default)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Error against the number of couplings, a panel for each linear layer, a line for each dimension."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axes = figure.subplots(1, len(LAYERS), sharey=True)
    dims = sorted({row["D"] for row in rows})
    for ax, layer in zip(axes, LAYERS, strict=True):
        for i, (D, color) in enumerate(zip(dims, COLORS, strict=False)):
            line = [row for row in rows if row["layer"] == layer and row["D"] == D]
            # Beside each other, not one over the other.
            numbers = [row["K"] * 1.06 ** (i - 1) for row in line]
            errors = [[max(error, FLOOR) for error in row["mse"]] for row in line]
            middle = list(map(statistics.median, errors))
            ax.plot(numbers, middle, color=color, lw=1.2, label=f"D = {D}")
            for number, values in zip(numbers, errors, strict=True):
                ax.plot([number] * len(values), values, "o", ms=4, color=color, alpha=0.5, mew=0)
        ax.axhline(FLOOR, color=COLORS[3], lw=0.8, ls=":", zorder=0)
        ax.set(xlabel="number of affine couplings", xscale="log", yscale="log")
        ax.set_title(layer, fontsize=10)
        ticks = sorted({row["K"] for row in rows})
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].text(1, 2 * FLOOR, "exact", va="bottom", fontsize=8, color=COLORS[3])
    axes[0].set_ylabel("mean squared error by entry")
    axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=100)
