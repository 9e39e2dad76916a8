"""What each element of an image adds to the log-det of a flow over images, and masks by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms import ComposeFlow, FlowTransform, Pixelwise
from ..transforms.affine import ElementwiseAffine
from ..transforms.coupling import Coupling
from ..transforms.linear import HouseholderLinear, LULinear, QRLinear
from ..transforms.multiscale import kept_elements


def pull_with_contributions(
    transform: FlowTransform, y: Tensor, ladj: Tensor
) -> tuple[Tensor, Tensor]:
    """x = f⁻¹(y), and `ladj` with what every element adds to log|det Df⁻¹(y)|: all `(*, C, H, W)`.

    The contributions of a layer add up to its log-det. Couplings and affine maps have them by element. A linear map of
    the channels mixes elements, and has no shares of theirs: its singular values take their place, the largest
    for the first channel (Das, Abbeel & Spanos 2019, sec. 3.2). Raises `TypeError` for a transform of another kind.
    """
    if isinstance(transform, ComposeFlow):
        for part in reversed(list(transform)):
            y, ladj = pull_with_contributions(part, y, ladj)
        return y, ladj
    if isinstance(transform, Coupling):
        seen, value, log_slope = transform.by_element(y, inverse=True)
        join = transform.split.join
        return join(seen, value), ladj + join(torch.zeros_like(seen), log_slope)
    if isinstance(transform, Pixelwise):
        return transform.inverse_and_ladj(y)[0], _by_channel(transform.transform, ladj)
    raise TypeError(
        f"contributions: {type(transform).__name__} has no log-det by element; expected couplings, and pixelwise "
        "linear and affine layers"
    )


def _by_channel(transform: Any, ladj: Tensor) -> Tensor:
    """`ladj` `(*, C, H, W)` after the inverse of a transform of the channels, its own contributions added."""
    if isinstance(transform, ComposeFlow):
        for part in reversed(list(transform)):
            ladj = _by_channel(part, ladj)
        return ladj
    if isinstance(transform, ElementwiseAffine):
        return ladj - transform.log_scale.reshape(-1, 1, 1)
    if isinstance(transform, HouseholderLinear):
        return ladj
    if isinstance(transform, LULinear | QRLinear):
        eye = torch.eye(transform.input_dim, dtype=ladj.dtype, device=ladj.device)
        matrix = transform.inverse_and_ladj(eye)[0] - transform.inverse_and_ladj(eye[0] * 0)[0]
        return ladj + torch.linalg.svdvals(matrix).log().reshape(-1, 1, 1)
    raise TypeError(
        f"contributions: {type(transform).__name__} of the channels has no log-det by channel; expected affine "
        "and linear ones"
    )


def masks_by_share(shares: Sequence[Tensor]) -> list[Tensor]:
    """Masks for `MultiScale`: of the four elements of each channel in each block, the two with the smaller shares leave.

    `shares`: for each level but the last, a number by element of the first level's image, `(C, H, W)` each. Elements that
    stay are followed from level to level.
    """
    masks: list[Tensor] = []
    if not shares:
        return masks
    origin = torch.arange(shares[0].numel(), device=shares[0].device).reshape(shares[0].shape)
    for share in shares:
        C, H, W = origin.shape
        blocks = share.flatten()[origin].reshape(C, H // 2, 2, W // 2, 2).movedim(2, 3).flatten(-2)
        leaves = blocks.argsort(-1).argsort(-1) < 2
        masks.append(leaves.unflatten(-1, (2, 2)).movedim(3, 2).reshape(C, H, W))
        origin = origin.flatten()[kept_elements(masks[-1], origin.shape)]
    return masks


def mean_by_place(share: Tensor, level: int) -> Tensor:
    """`share` `(C, H, W)` with the mean over the image of its place for each element.

    A place is one of the blocks of 2^(level + 1) pixels a side: those of 2 x 2 elements at that level, from 0.
    """
    C, H, W = share.shape
    side = 2 ** (level + 1)
    means = share.reshape(C, H // side, side, W // side, side).mean((1, 3))
    return means.repeat(1, H // side, W // side)
