"""Normalizing flows for Pyro: guides, bounds and densities.

    import pyro_flows_ext as pf

    result = pf.fit(model, pf.AutoIAF(model), X, y)
    print(result)

The names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "AutoAmortizedFlow",
    "AutoCIF",
    "AutoFlow",
    "AutoHamiltonian",
    "AutoIAF",
    "AutoMAF",
    "AutoNSF",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoResidual",
    "AutoSylvester",
    "CompiledSVI",
    "ContinuouslyIndexedFlow",
    "Dequantized",
    "FitResult",
    "FlowDistribution",
    "FlowVAE",
    "ImportanceWeightedELBO",
    "MultiScaleFlow",
    "NestedDropoutFlow",
    "datasets",
    "diagnostics",
    "distributions",
    "fit",
    "fit_density",
    "flows",
    "guides",
    "importance",
    "infer",
    "load",
    "nn",
    "ops",
    "programs",
    "refine",
    "results",
    "save",
    "summary",
    "testing",
    "to_inference_data",
    "transforms",
    "warm_start",
]

# The room of each name; the other names are rooms themselves.
_ROOMS: dict[str, tuple[str, ...]] = {
    "diagnostics": (
        "summary",
        "to_inference_data",
    ),
    "distributions": (
        "ContinuouslyIndexedFlow",
        "Dequantized",
        "FlowDistribution",
        "FlowVAE",
        "MultiScaleFlow",
        "NestedDropoutFlow",
    ),
    "guides": (
        "AutoAmortizedFlow",
        "AutoCIF",
        "AutoFlow",
        "AutoHamiltonian",
        "AutoIAF",
        "AutoMAF",
        "AutoNSF",
        "AutoPlanar",
        "AutoRadial",
        "AutoRealNVP",
        "AutoResidual",
        "AutoSylvester",
    ),
    "infer": (
        "CompiledSVI",
        "FitResult",
        "ImportanceWeightedELBO",
        "fit",
        "fit_density",
        "importance",
        "refine",
        "warm_start",
    ),
    "results": (
        "load",
        "save",
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

if TYPE_CHECKING:
    from . import (
        datasets,
        diagnostics,
        distributions,
        flows,
        guides,
        infer,
        nn,
        ops,
        programs,
        results,
        testing,
        transforms,
    )
    from .diagnostics import summary, to_inference_data  # type: ignore[no-redef]
    from .distributions import (
        ContinuouslyIndexedFlow,
        Dequantized,
        FlowDistribution,
        FlowVAE,
        MultiScaleFlow,
        NestedDropoutFlow,
    )
    from .guides import (
        AutoAmortizedFlow,
        AutoCIF,
        AutoFlow,
        AutoHamiltonian,
        AutoIAF,
        AutoMAF,
        AutoNSF,
        AutoPlanar,
        AutoRadial,
        AutoRealNVP,
        AutoResidual,
        AutoSylvester,
    )
    from .infer import (  # type: ignore[no-redef]
        CompiledSVI,
        FitResult,
        ImportanceWeightedELBO,
        fit,
        fit_density,
        importance,
        refine,
        warm_start,
    )
    from .results import load, save


if not TYPE_CHECKING:  # a type checker would take any name for granted

    def __getattr__(name: str) -> Any:
        if name in _ROOM_OF:
            return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
        if name in __all__:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
