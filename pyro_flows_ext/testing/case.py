"""One transform under test: how it is built, what values it gets, how a failure of anything under test is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypedDict

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn
from torch.distributions import biject_to
from typing_extensions import Self

from ..ops import find_event_shape
from ..transforms import FlowTransform

Factory = Callable[[], nn.Module]

# Absolute for values below 1, relative above (see `Case.close`). In float64 a sound transform misses by 1e-13 or so
# and a wrong one by 1e-2, so that 1e-9 needs no thought; in float32 a slope of 0.01 alone turns the last digit (1e-7)
# into 1e-5.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class ContractError(AssertionError):
    """Something breaks a point of its contract: `number` says which; the message adds by how much, if that is known."""

    def __init__(self, number: int, name: str, message: str):
        super().__init__(f"point {number} ({name}): {message}")
        self.number = number
        self.name = name


class Options(TypedDict, total=False):
    """What every check takes beside the factory.

    `event_shape`: shape of one input; by default by `input_dim`, read off the transform. `context_dim`: last
    dimension of the context; by default that of the transform. `dtype`: float64 by default. `seed`: 0 by default. `scale`: of
    the perturbation, .7 by default; a stack of layers needs less, since their condition numbers multiply.
    """

    event_shape: Sequence[int] | None
    context_dim: int | None
    dtype: torch.dtype
    seed: int
    scale: float


def perturb(
    module: nn.Module, *, scale: float = 0.7, generator: torch.Generator | None = None
) -> nn.Module:
    """Adds `scale` N(0, 1) to every parameter in place, divided by √(last dimension) for matrices; returns the module.

    Initial values hide errors: they sit near the identity, where many wrong log-dets are nearly right. Matrices are
    scaled down because raw noise in a wide one makes even sound flows ill-conditioned; for a convolution, of four
    dimensions, all but the first count.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
                noise = noise / fan_in**0.5
            parameter.add_((scale * noise).to(parameter))
    return module


class ContractCheck:
    """A point of a contract that is applied to something; as a context manager, it turns any exception into its failure."""

    def __init__(self, number: int, name: str, dtype: torch.dtype):
        self.number, self.name, self.dtype = number, name, dtype
        self.tolerance = TOLERANCE[dtype]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, ContractError):
            raise self.error(f"{type(error).__name__}: {error}") from error

    def error(self, message: str) -> ContractError:
        return ContractError(self.number, self.name, f"{str(self.dtype)[6:]}, {message}")

    def require(self, condition: bool, message: str) -> None:
        """Fails with `message` unless `condition`."""
        if not condition:
            raise self.error(message)

    def close(
        self, what: str, actual: Tensor, expected: Tensor, tolerance: float | None = None
    ) -> None:
        """Fails unless |actual - expected| <= tolerance (1 + |expected|) everywhere; NaN fails."""
        tolerance = self.tolerance if tolerance is None else tolerance
        self.require(
            actual.shape == expected.shape,
            f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}",
        )
        difference = (actual - expected).abs() / (1 + expected.abs())
        error = difference.nan_to_num(nan=math.inf).max().item() if difference.numel() else 0.0
        self.require(error <= tolerance, f"{what}: error {error:.3g}, tolerance {tolerance:.3g}")


class Case(ContractCheck):
    """A point of the contract applied to one factory.

    Raises `TypeError` if the factory makes neither a `FlowTransform` nor a `ConditionalTransformModule`, and
    `ValueError` if `event_shape` or `context_dim` is neither given nor to be read off the transform.
    """

    def __init__(
        self,
        number: int,
        name: str,
        factory: Factory,
        *,
        event_shape: Sequence[int] | None = None,
        context_dim: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        scale: float = 0.7,
    ):
        super().__init__(number, name, dtype)
        self.factory, self.context_dim = factory, context_dim
        self.seed, self.scale = seed, scale
        self._generator = torch.Generator().manual_seed(seed)
        self.module = self.build()
        self.event_shape = torch.Size(
            _read_event_shape(self.module) if event_shape is None else event_shape
        )

    # --- what is tested ---

    def build(self, seed: int | None = None) -> nn.Module:
        """A new module at perturbed parameters: the same for the same seed."""
        seed = self.seed if seed is None else seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.factory()
        if not isinstance(module, FlowTransform | ConditionalTransformModule):
            raise TypeError(f"factory: expected a FlowTransform, got {type(module).__name__}")
        known = module.context_dim if isinstance(module, FlowTransform) else None
        if self.context_dim is None:
            self.context_dim = known or None
        elif known not in (None, self.context_dim):
            raise ValueError(
                f"context_dim: expected {known}, that of {type(module).__name__}, got {self.context_dim}"
            )
        if self.context_dim is None and known is None:
            raise ValueError(
                f"context_dim: expected the size of the context of {type(module).__name__}, got None"
            )
        module = module.to(self.dtype)
        generator = torch.Generator().manual_seed(seed)
        return perturb(module, scale=self.scale, generator=generator)

    def bind(self, module: nn.Module, context: Tensor | None) -> FlowTransform:
        """The transform that is called: the module itself, or the module at a context."""
        return module if context is None else module.condition(context)  # type: ignore[return-value, operator]

    def base(self, transform: FlowTransform) -> dist.TorchDistribution:
        """Standard normal over the domain, or a normal mapped into it where the domain is not ℝⁿ."""
        zero = torch.zeros(self.event_shape, dtype=self.dtype)
        base = dist.Normal(zero, 1.0).to_event(len(self.event_shape))
        domain = transform.domain
        if getattr(domain, "base_constraint", domain) is constraints.real:
            return base
        return dist.TransformedDistribution(base, [biject_to(domain)])

    def density(self, transform: FlowTransform) -> dist.TransformedDistribution:
        """The law of y = f(x) for x from `base`, as Pyro has it."""
        return dist.TransformedDistribution(self.base(transform), [transform])

    def log_q(self, transform: FlowTransform, y: Tensor) -> Tensor:
        """The same law's log-density straight from the pure pass: `(*, event)` -> `(*)`."""
        x, ladj = transform.inverse_and_ladj(y)
        return self.base(transform).log_prob(x) + ladj

    # --- what it is fed: N(0, 2²), wider than anything a transform is drawn from, mapped into the domain ---

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)

    def context(self, *batch: int) -> Tensor | None:
        """A context `(*batch, C)`, or None for a plain transform."""
        return None if self.context_dim is None else self.normal(*batch, self.context_dim)

    def x(self, *batch: int) -> Tensor:
        """Inputs `(*batch, event)`."""
        transform = self.bind(self.module, self.context())
        return biject_to(transform.domain)(2 * self.normal(*batch, *self.event_shape))

    def y(self, *batch: int) -> Tensor:
        """Outputs that the transform has never made, `(*batch, event)`."""
        transform = self.bind(self.module, self.context())
        shape = transform.forward_shape(self.event_shape)
        return biject_to(transform.codomain)(2 * self.normal(*batch, *shape))


def _read_event_shape(module: nn.Module) -> torch.Size:
    """The shape by the `input_dim` of the first part of the module that has one; `ValueError` if none has."""
    shape = find_event_shape(module)
    if shape is None:
        raise ValueError(
            f"event_shape: {type(module).__name__} has no input_dim to read it from; give event_shape=(D,)"
        )
    return shape
