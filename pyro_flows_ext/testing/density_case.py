"""One density under test: how it is built, what values it gets, how a random bound is scored twice alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.distributions import biject_to

from ..distributions import Density
from .case import ContractCheck, perturb

DensityFactory = Callable[[], Density]
Reference = Callable[[Density, Tensor], Tensor]


class DensityOptions(TypedDict, total=False):
    """Options of every check of a density, beside the factory.

    `context_dim`: last dimension of the context of a conditional density. `dtype`: float64 by default. `seed`: 0 by
    default. `scale`: of the perturbation, .7 by default; a stack of layers needs less, and so does a bound, which
    perturbed inference networks make loose. `reference`: of a bound, log p(x) of a density and values `(*, *event)`.
    """

    context_dim: int | None
    dtype: torch.dtype
    seed: int
    scale: float
    reference: Reference | None


class DensityCase(ContractCheck):
    """A point of the contract of densities applied to one factory; leaves the random state as it was.

    Raises `TypeError` when the factory makes no `Density`.
    """

    def __init__(
        self,
        number: int,
        name: str,
        factory: DensityFactory,
        *,
        context_dim: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        scale: float = 0.7,
        reference: Reference | None = None,
    ):
        super().__init__(number, f"density: {name}", dtype)
        self.factory, self.context_dim, self.reference = factory, context_dim, reference
        self.seed, self.scale = seed, scale
        self._generator = torch.Generator().manual_seed(seed)
        self.module = self.build()
        self.event_shape = self.at(self.module, self.context()).event_shape

    # --- what is tested ---

    def build(self, seed: int | None = None, dtype: torch.dtype | None = None) -> Density:
        """A new density at perturbed parameters: the same for the same seed."""
        seed = self.seed if seed is None else seed
        with self.seeded(seed):
            density = self.factory()
        if not isinstance(density, Density):
            raise TypeError(
                f"factory: expected a pyro_flows_ext.distributions.Density, got {type(density).__name__}"
            )
        generator = torch.Generator().manual_seed(seed)
        perturb(density, scale=self.scale, generator=generator)
        return density.to(self.dtype if dtype is None else dtype)

    def at(self, density: Density, context: Tensor | None) -> Density:
        """The density that is sampled and scored: itself, or at a context."""
        return density if context is None else density.condition(context)

    def log_prob(self, density: Density, value: Tensor) -> Tensor:
        """log p(value), or where that is a random bound, the bound with the same noise at every call."""
        with self.seeded():
            return density.log_prob(value)

    @contextmanager
    def seeded(self, seed: int | None = None) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if seed is None else seed)
            yield

    # --- what it is fed ---

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def context(self, *batch: int) -> Tensor | None:
        """A context `(*batch, C)`, or None for a density without."""
        return None if self.context_dim is None else self.normal(*batch, self.context_dim)

    def values(self, *batch: int) -> Tensor:
        """Values that the density has never drawn, `(*batch, *event)`: N(0, 2²), mapped into its support."""
        support: Any = self.at(self.module, self.context()).support
        return biject_to(support)(2 * self.normal(*batch, *self.event_shape))

    # --- what it is compared by ---

    def gradients(self, density: Density, log_prob: Tensor, value: Tensor) -> dict[str, Tensor]:
        """By name, of Σ log p: in the value and in every parameter that requires one."""
        named = {n: p for n, p in density.named_parameters() if p.requires_grad}
        wanted = [value, *named.values()]
        grads = torch.autograd.grad(log_prob.sum(), wanted, allow_unused=True)
        for name, grad in zip(["the value", *named], grads, strict=True):
            self.require(grad is not None, f"{name} has no gradient")
        return dict(zip(["the value", *named], grads, strict=True))
