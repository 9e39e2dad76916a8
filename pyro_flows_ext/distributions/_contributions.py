"""Contributions of each element of an image to the log-det of a flow over images, and masks by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms import ComposeFlow, FlowTransform, Pixelwise, Squeeze
from ..transforms.affine import ElementwiseAffine
from ..transforms.coupling import Coupling
from ..transforms.linear import HouseholderLinear, LULinear, QRLinear
from ..transforms.multiscale import kept_elements


def pull_with_contributions(
    transform: FlowTransform, y: Tensor, ladj: Tensor, *, carry: bool = True
) -> tuple[Tensor, Tensor]:
    """x = f⁻¹(y), and `ladj` plus the contribution of every element to log|det Df⁻¹(y)|: all `(*, C, H, W)`.

    The contributions of a layer sum to its log-det. Couplings and affine maps have them by element. A linear map of
    the channels mixes elements: see `_mix`. Raises `TypeError` for a transform of another kind.
    """
    if isinstance(transform, ComposeFlow):
        for part in reversed(list(transform)):
            y, ladj = pull_with_contributions(part, y, ladj, carry=carry)
        return y, ladj
    if isinstance(transform, Coupling):
        seen, value, log_slope = transform.by_element(y, inverse=True)
        join = transform.split.join
        return join(seen, value), ladj + join(torch.zeros_like(seen), log_slope)
    if isinstance(transform, Pixelwise):
        return transform.inverse_and_ladj(y)[0], _by_channel(transform.transform, ladj, carry)
    raise TypeError(
        f"contributions: {type(transform).__name__} has no log-det by element; expected couplings, and pixelwise "
        "linear and affine layers"
    )


def _by_channel(transform: Any, ladj: Tensor, carry: bool) -> Tensor:
    """`ladj` `(*, C, H, W)` after the inverse of a transform of the channels, its own contributions added."""
    if isinstance(transform, ComposeFlow):
        for part in reversed(list(transform)):
            ladj = _by_channel(part, ladj, carry)
        return ladj
    if isinstance(transform, ElementwiseAffine):
        return ladj - transform.log_scale.reshape(-1, 1, 1)
    if isinstance(transform, HouseholderLinear | LULinear | QRLinear):
        eye = torch.eye(transform.input_dim, dtype=ladj.dtype, device=ladj.device)
        rows = transform.inverse_and_ladj(eye)[0] - transform.inverse_and_ladj(eye[0] * 0)[0]
        return _mix(rows.mT, ladj, carry)
    raise TypeError(
        f"contributions: {type(transform).__name__} of the channels has no log-det by channel; expected affine "
        "and linear ones"
    )


def _mix(matrix: Tensor, ladj: Tensor, carry: bool) -> Tensor:
    """`ladj` `(*, C, H, W)` after x = M y of the channels, the log singular values σ of M = U diag(σ) Vᵀ added.

    With `carry`, shares follow what they are the shares of: those so far move by the squares of Q = UVᵀ, the orthogonal
    map nearest to M, whose rows and columns add up to 1, and channel c gains Σ_i U_ci² log σ_i. A permutation of the
    channels then permutes the shares. Without, shares stay in place, and channel i gains the i-th largest log σ.
    """
    U, sigma, Vh = torch.linalg.svd(matrix)
    gain = sigma.log()
    if carry:
        ladj = torch.einsum("cd,...dhw->...chw", (U @ Vh).square(), ladj)
        gain = U.square() @ gain
    return ladj + gain.reshape(-1, 1, 1)


def masks_by_share(shares: Sequence[Tensor], *, across_channels: bool = False) -> list[Tensor]:
    """Masks for `MultiScale`: half of the elements in each block of 2 x 2 pixels leave, those with the smaller shares.

    They are two of the four of each channel, or with `across_channels` 2 C of the 4 C of all. `shares`: for each level but
    the last, a number by element of the first level's image, `(C, H, W)` each. Elements that stay are followed from
    level to level.
    """
    masks: list[Tensor] = []
    if not shares:
        return masks
    origin = torch.arange(shares[0].numel(), device=shares[0].device).reshape(shares[0].shape)
    for share in shares:
        blocks = Squeeze().forward_and_ladj(share.flatten()[origin])[
            0
        ]  # (4 C, H / 2, W / 2), channel by channel
        if not across_channels:
            blocks = blocks.unflatten(0, (-1, 4)).movedim(1, 0)
        leaves = blocks.argsort(0).argsort(0) < len(blocks) // 2
        if not across_channels:
            leaves = leaves.movedim(0, 1).flatten(0, 1)
        masks.append(Squeeze().inverse_and_ladj(leaves)[0])
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
