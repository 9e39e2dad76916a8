"""Transforms of vectors on images: one map of the channels, at every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor
from typing_extensions import Self

from ._constrain import IMAGE, check_event_dim
from .base import FlowTransform
from .compose import at_context
from .conditional import ConditionalModule
from .linear import ConditionalLULinear, LULinear

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]


class Pixelwise(FlowTransform):
    """y[:, h, w] = f(x[:, h, w]): a transform f of vectors `(C)`, over the channels of an image, at every pixel alike.

    log|det| = Σ_hw log|det Df(x[:, h, w])|, as exact as f's. For every f, `Permute`, `ActNorm` and `ComposeFlow` among them;
    `Pixelwise(f).initialize(batch)` takes a batch of images, where f has an `initialize`. The batch shape is f's: f at a
    context is one map for each image. Training-mode passes of `BatchNorm` and of `ActNorm(...,
    initialize_on_first_batch=True)` count pixels for rows.
    `sign` is 0, for not known, unless f's is 1: it depends on the number of pixels.

    Shapes: x `(*, C, H, W)` -> y the same, ladj `(*)`. Cost: f on H · W times as many rows, in memory with channels
    last. Raises `TypeError` when f is no `FlowTransform`, `ValueError` when it is not one of vectors, or for an input
    with fewer than three dimensions or another number of channels than f takes.
    """

    domain = codomain = IMAGE

    def __init__(self, transform: FlowTransform):
        super().__init__()
        if not isinstance(transform, FlowTransform):
            raise TypeError(f"transform: expected a FlowTransform, got {type(transform).__name__}")
        for end in (transform.domain, transform.codomain):
            if end.event_dim != 1:
                raise ValueError(
                    f"transform: expected a transform of vectors, got {transform!r} between events of "
                    f"{transform.domain.event_dim} and {transform.codomain.event_dim} dimensions"
                )
        self.transform = transform

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass("x", x, self.transform.forward_and_ladj)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._pass("y", y, self.transform.inverse_and_ladj)

    def _pass(self, name: str, x: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        check_event_dim(name, x, 3)
        # Channels go last, and the pixels before the dimensions of f's batch, against which the others broadcast.
        depth = len(self.transform.batch_shape)
        x = x[(None,) * (depth + 3 - x.dim())]
        pixels = (-3 - depth, -2 - depth)
        y, ladj = run(x.movedim((-2, -1), pixels))
        return y.movedim(pixels, (-2, -1)), ladj.sum((-2 - depth, -1 - depth))

    @property
    def initialize(self) -> Callable[..., None]:
        """`initialize(batch, **options)` of f for images `(*, C, H, W)`; no such attribute where f has none."""
        initialize: Callable[..., None] = self.transform.initialize  # type: ignore[assignment]

        def of_images(batch: Tensor, **options: bool) -> None:
            check_event_dim("batch", batch, 3)
            initialize(batch.movedim(-3, -1), **options)

        return of_images

    @property
    def batch_shape(self) -> torch.Size:  # type: ignore[override]
        return self.transform.batch_shape

    @property
    def sign(self) -> int:
        return (1 + self.transform.sign) // 2

    def with_context(self, context: Tensor) -> Self:
        """This transform with `context` `(*, C)` given to f, one for each image."""
        return self._around(at_context(self.transform, context))

    def _around(self, transform: FlowTransform) -> Self:
        """This transform with another f."""
        view = self._view(transform.batch_shape)
        view.__dict__["_modules"] = {"transform": transform}
        return view

    def _state(self) -> list[Tensor]:
        return self.transform._state()  # with what f is bound to, which is no parameter

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform!r})"


class ConditionalPixelwise(ConditionalModule):
    """`Pixelwise` of a conditional transform of vectors; `.condition(context)` with `(*, K)` gives one map an image."""

    def __init__(self, transform: ConditionalTransformModule):
        super().__init__()
        self.transform = transform

    def condition(self, context: Tensor) -> Pixelwise:
        """The transform for this context: `(*, K)` -> a transform of batch shape `(*)`."""
        return Pixelwise(self.transform.condition(context))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform!r})"


class Invertible1x1Conv(Pixelwise):
    """y[:, h, w] = P (L U x[:, h, w] + b): an invertible 1x1 convolution by its LU factors, a `Pixelwise` `LULinear`.

    log|det| = H W Σ log U_cc, exact. Starts at P, a random permutation of the channels that stays as it is, or at the
    identity with `permute=False`; Glow starts at a random rotation. `bias=True` adds b.

    Shapes: x `(*, C, H, W)` -> y the same, ladj `(*)`. Parameters and their bounds are `LULinear`'s.
    Cost: O(C²) a pixel in both directions.

    Source: Kingma & Dhariwal 2018, Glow, sec. 3.2.
    """

    transform: LULinear

    def __init__(self, num_channels: int, *, bias: bool = False, permute: bool = True):
        super().__init__(LULinear(num_channels, bias=bias, permute=permute))

    def __repr__(self) -> str:
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"{type(self).__name__}({self.transform.extra_repr()}{batch})"


class ConditionalInvertible1x1Conv(ConditionalPixelwise):
    """`Invertible1x1Conv` whose L, U and b depend on a context `(*, K)`; `.condition(context)` gives the transform.

    One convolution for each image; P stays fixed. See `ConditionalLULinear`.
    """

    def __init__(
        self,
        num_channels: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        bias: bool = False,
        permute: bool = True,
    ):
        super().__init__(
            ConditionalLULinear(num_channels, context_dim, hidden_dims, bias=bias, permute=permute)
        )


def invertible_1x1_conv(
    num_channels: int, *, bias: bool = False, permute: bool = True
) -> Invertible1x1Conv:
    """An invertible 1x1 convolution: see `Invertible1x1Conv`."""
    return Invertible1x1Conv(num_channels, bias=bias, permute=permute)


def conditional_invertible_1x1_conv(
    num_channels: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    bias: bool = False,
    permute: bool = True,
) -> ConditionalInvertible1x1Conv:
    """An invertible 1x1 convolution amortized over a context: see `ConditionalInvertible1x1Conv`."""
    return ConditionalInvertible1x1Conv(
        num_channels, context_dim, hidden_dims, bias=bias, permute=permute
    )
