"""Points 14 to 16: the transform inside distributions and Pyro programs, and the package as a guest in the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from typing_extensions import Unpack

from ..transforms import FlowTransform
from .case import Case, ContractError, Factory, Options

DENSITY_TOLERANCE = 0.01


def check_density(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 14: the density of y = f(x), x standard normal, integrates to 1 ± 0.01 on a grid, in one or two dimensions.

    Raises `ValueError` for events of three numbers and more.
    """
    case = Case(14, "density", factory, **options)
    if case.event_shape.numel() > 2:
        raise ValueError(
            f"check_density: expected an event of one or two numbers, got shape {tuple(case.event_shape)}"
        )
    with case:
        density = case.density(case.bind(case.module, case.context()))
        integral = integrate(density, seed=case.seed).item()
        case.require(
            abs(integral - 1) <= DENSITY_TOLERANCE,
            f"the density integrates to {integral:.4f}, tolerance {DENSITY_TOLERANCE}",
        )


def integrate(density: dist.TorchDistribution, *, seed: int = 0) -> Tensor:
    """∫ q(y) dy for a density over `(1,)` or `(2,)`, by midpoints on a grid that is refined until two of them agree."""
    return on_grid(density, seed=seed)[1].sum()


@torch.no_grad()
def on_grid(
    density: Any, *, seed: int = 0, resolutions: Sequence[int] = (200, 400, 800, 1600)
) -> tuple[Tensor, Tensor]:
    """Midpoints y `(G, D)` of the cells of a grid, D = 1 or 2, and the mass q(y) dy `(G)` of each, float64.

    The grid is refined, over `resolutions` points a dimension, until its total settles; the box is that of 20,000 draws
    with a margin of a tenth, within the support where that is an interval.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draws = density.sample(torch.Size((20_000,)))
    low, high = draws.double().amin(0), draws.double().amax(0)
    margin = 0.1 * (high - low)
    low, high = low - margin, high + margin
    support = density.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if isinstance(support, torch.distributions.constraints.interval):
        low, high = low.clamp(min=support.lower_bound), high.clamp(max=support.upper_bound)
    width = high - low
    last = torch.tensor(torch.inf)
    for points in resolutions:
        middle = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        unit = torch.cartesian_prod(*[middle] * len(low)).reshape(-1, len(low))
        grid = low + width * unit
        values = [density.log_prob(part.to(draws)).exp().double() for part in grid.split(200_000)]
        mass = torch.cat(values) * width.prod() / len(grid)
        if (mass.sum() - last).abs() < DENSITY_TOLERANCE / 10:
            break
        last = mass.sum()
    return grid, mass


def check_import_is_pure(package: str = "pyro_flows_ext") -> None:
    """Point 15: importing a package and all its parts changes no global state, and brings in no heavy module.

    In a process of its own: torch's default dtype, threads, random state, grad mode and optimizer hooks, the
    validation flags of torch and Pyro, the parameter store, and NumPy's and Python's random states stay; matplotlib, arviz,
    scikit-learn and rich are not imported. It is about a package, not a transform, so `check_transform` leaves it out.
    """
    process = subprocess.run(
        [sys.executable, "-c", _IMPORT_SCRIPT, package], capture_output=True, text=True
    )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise ContractError(15, "import is pure", lines[-1])


_IMPORT_SCRIPT = """
import importlib, pkgutil, random, sys, warnings
import numpy, pyro, pyro.infer, pyro.poutine.util, torch
from torch.optim import optimizer

HEAVY = {"matplotlib", "arviz", "sklearn", "rich"} - set(sys.modules)

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.empty(0).device),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "random state of torch": torch.get_rng_state().tolist(),
        "random state of numpy": str(numpy.random.get_state()),
        "random state of python": random.getstate(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "optimizer hooks": (
            list(optimizer._global_optimizer_pre_hooks), list(optimizer._global_optimizer_post_hooks)
        ),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "validation of pyro": (
            pyro.distributions.is_validation_enabled(),
            pyro.infer.util.is_validation_enabled(),
            pyro.poutine.util.is_validation_enabled(),
        ),
        "parameter store": list(pyro.get_param_store().keys()),
        "warning filters": list(warnings.filters),
    }

before = state()
package = importlib.import_module(sys.argv[1])
for part in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not part.name.endswith("__main__"):
        importlib.import_module(part.name)
after = state()
changed = [name for name in before if before[name] != after[name]]
heavy = sorted(HEAVY & set(sys.modules))
if changed or heavy:
    sys.exit(f"importing {sys.argv[1]} changed {changed} and imported {heavy}")
"""


def check_plates(factory: Factory, **options: Unpack[Options]) -> None:
    """Point 16: the density in Pyro programs: plates, subsampling with its scale, `obs`, replay and `expand`."""
    with Case(16, "plates", factory, **options) as case, torch.no_grad():
        contexts, data = case.context(6), case.y(4, 6)

        def transform(index: Tensor) -> FlowTransform:
            return case.bind(case.module, None if contexts is None else contexts[index])

        def model(subsample_size: int | None = None, is_observed: bool = False) -> Tensor:
            with (
                pyro.plate("outer", 4, dim=-2),
                pyro.plate("data", 6, subsample_size=subsample_size, dim=-1) as index,
            ):
                rows = torch.as_tensor(index)
                obs = data[:, rows] if is_observed else None
                return pyro.sample("y", case.density(transform(rows)), obs=obs)

        def check(what: str, trace: Trace, size: int = 6) -> None:
            value, index = (torch.as_tensor(trace.nodes[name]["value"]) for name in ("y", "data"))
            shape = (4, size, *data.shape[2:])
            case.require(
                tuple(value.shape) == shape,
                f"{what}: expected a value of shape {shape}, got {tuple(value.shape)}",
            )
            expected = 6 / size * case.log_q(transform(index), value).sum()
            log_prob_sum = torch.as_tensor(trace.log_prob_sum())
            case.close(f"{what}: log_prob_sum", log_prob_sum, expected)

        with torch.random.fork_rng(devices=[]), pyro.validation_enabled(True), poutine.block():
            torch.manual_seed(case.seed)
            trace = poutine.trace(model).get_trace()
            check("draws in plates", trace)
            replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
            case.require(
                replayed.nodes["y"]["value"] is trace.nodes["y"]["value"],
                "replay: the value was drawn again",
            )
            check("replay", replayed)
            check("subsample", poutine.trace(model).get_trace(2), 2)
            check("obs", poutine.trace(model).get_trace(is_observed=True))
            check("obs, subsample", poutine.trace(model).get_trace(2, is_observed=True), 2)

            density = case.density(transform(torch.arange(6)))
            wide = density.expand((4, 6))
            draws = wide.sample()
            case.require(
                tuple(wide.batch_shape) == (4, 6) and draws.shape == data.shape,
                f"expand: expected batch_shape (4, 6), got {tuple(wide.batch_shape)}",
            )
            case.require(not torch.equal(draws[0], draws[1]), "expand: rows share one draw")
            case.close("expand: log_prob", wide.log_prob(data), density.log_prob(data))
