"""Transforms of vectors on images: one map of the channels, at every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from typing_extensions import Self

from ..ops import check_event_dim
from .base import IMAGE, FlowTransform
from .linear import LULinear

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]


class Pixelwise(FlowTransform):
    """y[:, h, w] = f(x[:, h, w]): a transform f of vectors `(C)` over the channels of an image, at every pixel alike.

    log|det| = Σ_hw log|det Df(x[:, h, w])|, as exact as that of f. The batch shape is f's: f at a context is one map
    for each image. `Pixelwise(f).initialize(batch)` takes images where f has an `initialize`; training-mode passes
    of `BatchNorm` and of `ActNorm(..., initialize_on_first_batch=True)` count pixels as rows. `sign` is 0, for not
    known, unless f's is 1: it depends on the number of pixels. Cost: f on H · W times as many rows.

    Args:
        transform: f, of vectors.

    Raises:
        TypeError: if `transform` is not a `FlowTransform`.
        ValueError: if f is not a transform of vectors, or in a pass if the input has fewer than three dimensions.

    Example:
        >>> Pixelwise(Permute([1, 0])).forward_and_ladj(torch.zeros(5, 2, 4, 4))[0].shape
        torch.Size([5, 2, 4, 4])
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
        self.context_dim, self.batch_shape = transform.context_dim, transform.batch_shape

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
    def sign(self) -> int:
        return (1 + self.transform.sign) // 2

    def condition(self, context: Tensor) -> Self:
        """Returns this transform with f at a context `(*, context_dim)`, one for each image."""
        if not self.context_dim:
            return self
        transform = self.transform.condition(context)
        return self._with_modules(transform.batch_shape, transform=transform)

    def extra_repr(self) -> str:
        return repr(self.transform)


class Invertible1x1Conv(Pixelwise):
    """y[:, h, w] = P (L U x[:, h, w] + b): an invertible 1x1 convolution by its LU factors, a `Pixelwise` `LULinear`.

    log|det| = H W Σ log U_cc, exact. Starts at P, a random permutation of the channels that stays fixed; Glow starts
    at a random rotation. Parameters and their bounds are those of `LULinear`. Cost: O(C²) a pixel in both directions.

    Args:
        num_channels: C.
        bias: whether b is learned; 0 otherwise.
        permute: whether P is random; the identity otherwise.
        context_dim: number of context variables that L, U and b depend on: one convolution for each image.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default.

    Example:
        >>> Invertible1x1Conv(3, permute=False)
        Invertible1x1Conv(3, bias=False, permute=False)

    References:
        Kingma & Dhariwal 2018, Glow, sec. 3.2.
    """

    transform: LULinear

    def __init__(
        self,
        num_channels: int,
        *,
        bias: bool = False,
        permute: bool = True,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__(
            LULinear(
                num_channels,
                bias=bias,
                permute=permute,
                context_dim=context_dim,
                hidden_dims=hidden_dims,
            )
        )

    def extra_repr(self) -> str:
        return self.transform.extra_repr()
