"""Densities by the names of their papers: each is an `nn.Module` and a Pyro distribution, ready to train.

    flow = pf.flows.NSF(3, context_dim=2)
    pf.fit_density(flow, y, context=x)
    flow.condition(x_new).log_prob(y_new)

Every function takes the event (D, `(D,)` or `(C, H, W)`) and keywords; `FLOWS` lists them by the names of the command line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..distributions import Density
from ..transforms.by_name import PRESETS
from .angles import CircularNSF
from .images import Glow, NSFImage, RealNVPImage
from .latent import CIF, VAE, NestedDropout
from .recipe import Recipe
from .vectors import IAF, MAF, NICE, NSF, Planar, Radial, RealNVP, Residual, Sylvester

__all__ = [
    "CIF",
    "FLOWS",
    "IAF",
    "MAF",
    "NICE",
    "NSF",
    "VAE",
    "CircularNSF",
    "Flow",
    "Glow",
    "NSFImage",
    "NestedDropout",
    "Planar",
    "Radial",
    "RealNVP",
    "RealNVPImage",
    "Recipe",
    "Residual",
    "Sylvester",
    "make",
]


@dataclass(frozen=True)
class Flow:
    """A density by name: a function of this module, options that go with the name, and a description."""

    function: Callable[..., Density]
    description: str
    options: dict[str, Any] = field(default_factory=dict)
    of_images: bool = False

    def __call__(self, event_shape: Any, **arguments: Any) -> Density:
        """The density; arguments that are None keep their defaults."""
        given = {name: value for name, value in arguments.items() if value is not None}
        return self.function(event_shape, **{**self.options, **given})

    @property
    def takes_context(self) -> bool:
        """Whether the density can depend on a context."""
        return "context_dim" in inspect.signature(self.function).parameters

    @property
    def num_layers(self) -> int | None:
        """The number of layers by default; None for one linear layer."""
        defaults = inspect.signature(self.function).parameters
        if "num_layers" in self.options or defaults["num_layers"].default is not None:
            return self.options.get("num_layers", defaults["num_layers"].default)
        inner = PRESETS.get(self.options.get("flow", defaults["flow"].default))
        return None if inner is None else inner.num_layers


def _preset(function: Callable[..., Density], name: str, **options: Any) -> Flow:
    return Flow(function, PRESETS[name].description, options)


FLOWS = {
    "nsf": _preset(NSF, "nsf"),
    "nsf-ar": Flow(
        NSF,
        "autoregressive splines (Durkan et al. 2019); draws variable by variable",
        {"kind": "autoregressive", "num_layers": 3},
    ),
    "circular-nsf": _preset(CircularNSF, "circular-nsf"),
    "maf": _preset(MAF, "maf"),
    "iaf": _preset(IAF, "iaf"),
    "realnvp": _preset(RealNVP, "realnvp"),
    "glow-vector": _preset(RealNVP, "glow-vector", linear=True),
    "nice": _preset(NICE, "nice"),
    "residual": _preset(Residual, "residual"),
    "planar": _preset(Planar, "planar"),
    "radial": _preset(Radial, "radial"),
    "sylvester": _preset(Sylvester, "sylvester"),
    "cif-maf": Flow(
        CIF, "maf, continuously indexed (Cornish et al. 2020); a bound", {"flow": "maf"}
    ),
    "cif-nsf": Flow(
        CIF,
        "nsf, continuously indexed (Cornish et al. 2020); a bound",
        {"flow": "nsf", "linear": False},
    ),
    "nested-qr": Flow(
        NestedDropout, "one linear layer with ordered latents (Bekasov & Murray 2020)"
    ),
    "nested-lu": Flow(NestedDropout, "the same, by an LU decomposition", {"flow": "lu"}),
    "nested-nsf": Flow(
        NestedDropout, "nsf with ordered latents (Bekasov & Murray 2020)", {"flow": "nsf"}
    ),
    "flow-vae": Flow(VAE, "nsf over a small VAE, trained first (Das et al. 2019); a bound"),
    "glow": Flow(Glow, "Glow, of images (Kingma & Dhariwal 2018)", of_images=True),
    "realnvp-image": Flow(RealNVPImage, "RealNVP, of images (Dinh et al. 2017)", of_images=True),
    "nsf-image": Flow(NSFImage, "RQ-NSF (C), of images (Durkan et al. 2019)", of_images=True),
}


def make(recipe: Recipe) -> Density:
    """Makes a density, not trained, as another one was made: see `density.recipe`.

    Raises:
        ValueError: no function of `flows` has the name, or the arguments are not those of it.
    """
    functions = {flow.function.__name__: flow.function for flow in FLOWS.values()}
    if recipe.name not in functions:
        raise ValueError(f"recipe: expected one of {', '.join(functions)}, got {recipe.name!r}")
    try:
        return functions[recipe.name](**recipe.arguments)
    except TypeError as error:
        raise ValueError(f"recipe: {error}") from error
