"""The contract of a transform as functions that anybody can call on a transform of their own.

    from pyro_flows_ext.testing import check_transform

    def test_my_transform():
        check_transform(lambda: MyTransform(3))
        check_transform(lambda: MyTransform(3, context_dim=2))

One function a point, or `check_transform` for all that apply. Every check builds the transform anew, moves it to the
dtype, perturbs its parameters (`perturb`) and raises `ContractError` with the point's number and name, the error
measured and the tolerance. A test framework reports each failure by itself when it parametrizes over `POINTS`:

    @pytest.mark.parametrize("point", POINTS.values(), ids=str)
    def test_contract(point):
        for dtype in point.dtypes:
            point.check(lambda: MyTransform(2), dtype=dtype)

Transforms with random passes or batch statistics are under contract in eval mode: let the factory return
`MyTransform(3).eval()`. Point 15 is about a package: `check_import_is_pure("my_package")`.

Densities have a contract of their own, `check_density_contract(lambda: MyDensity(2))`, with its points in
`DENSITY_POINTS`: see `testing.densities`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from typing_extensions import Unpack

from .case import Case, ContractError, Factory, Options, perturb
from .densities import (
    check_density_bound,
    check_density_integral,
    check_density_scores,
    check_density_shapes,
    has_integral,
)
from .density_case import DensityCase, DensityFactory, DensityOptions
from .density_programs import (
    check_density_compiles,
    check_density_copies,
    check_density_device,
    check_density_dtype,
    check_density_plates,
    check_density_trains,
)
from .modules import (
    check_compiles,
    check_copies,
    check_device,
    check_fresh_after_step,
    check_inputs_untouched,
)
from .numerics import (
    check_batch_shapes,
    check_dtype,
    check_gradients,
    check_inverse_ladj,
    check_ladj,
    check_one_pass,
    check_per_sample_gradients,
    check_round_trip,
)
from .programs import check_density, check_import_is_pure, check_plates, integrate


class Check(Protocol):
    """The signature of the functions of all points."""

    __name__: str

    def __call__(self, factory: Factory, **options: Unpack[Options]) -> None: ...


class Point(NamedTuple):
    """One point of the contract: its number, its function, and the dtypes in which it says something new."""

    number: int
    check: Check
    dtypes: Sequence[torch.dtype] = (torch.float64,)

    def __str__(self) -> str:
        return f"{self.number}-{self.check.__name__.removeprefix('check_')}"


_BOTH = (torch.float64, torch.float32)

POINTS = {
    point.number: point
    for point in (
        Point(1, check_round_trip, _BOTH),
        Point(2, check_ladj, _BOTH),
        Point(3, check_inverse_ladj, _BOTH),
        Point(4, check_one_pass, _BOTH),
        Point(5, check_batch_shapes, _BOTH),
        Point(6, check_dtype, _BOTH),
        Point(7, check_gradients, _BOTH),
        Point(8, check_per_sample_gradients, _BOTH),
        Point(9, check_copies),
        Point(10, check_device),
        Point(11, check_inputs_untouched),
        Point(12, check_fresh_after_step, _BOTH),
        Point(13, check_compiles),
        Point(14, check_density),
        Point(16, check_plates),
    )
}


def check_transform(
    factory: Factory,
    *,
    event_shape: Sequence[int] | None = None,
    context_dim: int | None = None,
    points: Iterable[int] | None = None,
    seed: int = 0,
    scale: float = 0.7,
) -> None:
    """Runs the points of the contract on the transform that `factory()` makes, float64 then float32.

    `points=None` runs all, but for the density (14) of events of three numbers and more, which no grid can integrate:
    make a 2-D transform for that one. `scale`, of the perturbation, should be smaller for stacks of many layers, whose
    condition numbers multiply. Raises `ContractError` at the first point that fails.
    """
    for number in POINTS if points is None else points:
        if number not in POINTS:
            raise ValueError(f"points: expected numbers of {list(POINTS)}, got {number!r}")
        point = POINTS[number]
        for dtype in point.dtypes:
            options: Options = {
                "event_shape": event_shape,
                "context_dim": context_dim,
                "dtype": dtype,
                "seed": seed,
                "scale": scale,
            }
            if points is None and number == 14:
                case = Case(14, "density", factory, **options)
                if case.event_shape.numel() > 2:
                    continue
            point.check(factory, **options)


class DensityCheck(Protocol):
    """The signature of the functions of all points of densities."""

    def __call__(self, factory: DensityFactory, **options: Unpack[DensityOptions]) -> None: ...


DENSITY_POINTS: dict[int, DensityCheck] = {
    1: check_density_integral,
    2: check_density_shapes,
    3: check_density_scores,
    4: check_density_bound,
    5: check_density_plates,
    6: check_density_trains,
    7: check_density_copies,
    8: check_density_dtype,
    9: check_density_device,
    10: check_density_compiles,
}


def check_density_contract(
    factory: DensityFactory,
    *,
    points: Iterable[int] | None = None,
    **options: Unpack[DensityOptions],
) -> None:
    """Runs the points of the contract on the density that `factory()` makes, in float64.

    `points=None` runs all that apply: a grid (1) takes one or two dimensions and no batch, and a bound (4) needs
    `reference=`. Raises `ContractError` at the first point that fails.
    """
    for number in DENSITY_POINTS if points is None else points:
        if number not in DENSITY_POINTS:
            raise ValueError(f"points: expected numbers of {list(DENSITY_POINTS)}, got {number!r}")
        if points is None and not density_point_applies(number, factory, **options):
            continue
        DENSITY_POINTS[number](factory, **options)


def density_point_applies(
    number: int, factory: DensityFactory, **options: Unpack[DensityOptions]
) -> bool:
    """Whether a point says something about this density."""
    if number == 1:
        case = DensityCase(1, "integral", factory, **options)
        return has_integral(case.at(case.module, case.context()))
    return number != 4 or options.get("reference") is not None


__all__ = [
    "DENSITY_POINTS",
    "POINTS",
    "ContractError",
    "Point",
    "check_batch_shapes",
    "check_compiles",
    "check_copies",
    "check_density",
    "check_density_bound",
    "check_density_compiles",
    "check_density_contract",
    "check_density_copies",
    "check_density_device",
    "check_density_dtype",
    "check_density_integral",
    "check_density_plates",
    "check_density_scores",
    "check_density_shapes",
    "check_density_trains",
    "check_device",
    "check_dtype",
    "check_fresh_after_step",
    "check_gradients",
    "check_import_is_pure",
    "check_inputs_untouched",
    "check_inverse_ladj",
    "check_ladj",
    "check_one_pass",
    "check_per_sample_gradients",
    "check_plates",
    "check_round_trip",
    "check_transform",
    "density_point_applies",
    "integrate",
    "perturb",
]
