"""Bounds on the operator norms of linear layers, by construction: no power iteration, no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A Gram matrix is normalised and squared three times, and that three times over: G⁵¹², whose Frobenius norm exceeds its
# spectral norm by no more than the square root of its size. That leaves a factor of (2n)^(1/2048), 1.003 for n = 256.
ROUNDS, SQUARINGS = 3, 3


def spectral_norm_bound(A: Tensor) -> Tensor:
    """Returns an upper bound on ‖A‖₂, `(*)`, too large by a factor of n^(1/2048) at most, n = min(m, k).

    The Schatten norm (Σ σᵢᵖ)^(1/p) with p = 1024, from repeated squaring of the Gram matrix: matrix products only,
    exactly differentiable with tied singular values and at A = 0 (gradient 0), where singular vectors are not unique.
    Cost: 10 products of n x n matrices.

    Args:
        A: `(*, m, k)`.

    Example:
        >>> round(spectral_norm_bound(torch.diag(torch.tensor([3.0, 1.0]))).item(), 2)
        3.0

    References:
        Delattre, Barthélemy, Araujo & Allauzen 2023, Efficient Bound of Lipschitz Constant for Convolutional Layers by
        Gram Iteration.
    """
    G = A.mT @ A if A.shape[-1] <= A.shape[-2] else A @ A.mT
    tiny = torch.finfo(A.dtype).tiny
    log_norm, exponent = torch.zeros((), dtype=A.dtype, device=A.device), 0.5
    for step in range(ROUNDS + 1):
        # log λ(G) = log ‖G‖ + 2⁻³ log λ((G / ‖G‖)⁸), and at last λ <= ‖·‖. Normalised, G has its largest eigenvalue in
        # [n^-½, 1], so that its eighth power neither overflows nor vanishes.
        square = (G * G).sum((-2, -1), keepdim=True).clamp_min(tiny)
        log_norm = log_norm + exponent * 0.5 * square.log()
        if step == ROUNDS:
            break
        G = G * square.rsqrt()
        for _ in range(SQUARINGS):
            G = G @ G
        exponent /= 2**SQUARINGS
    return log_norm[..., 0, 0].exp()


def conv_norm_bound(weight: Tensor, image_size: Sequence[int]) -> Tensor:
    """Returns an upper bound on the operator norm of a 2-D convolution, `()`, loose on a few pixels and tight on many.

    The convolution is a part of the circular one on (H + h // 2, W + w // 2), which is a matrix C_out x C_in at each
    frequency; the bound is the largest of their spectral norms. Cost: 10 products of n x n matrices for half of the
    frequencies, n = 2 min(C_out, C_in).

    Args:
        weight: `(C_out, C_in, h, w)`, of a convolution with stride 1 and zero padding ("same"); h and w odd.
        image_size: (H, W).

    Raises:
        ValueError: for an even kernel size.

    Example:
        >>> round(conv_norm_bound(2 * torch.ones(1, 1, 1, 1), (4, 4)).item(), 2)
        2.0

    References:
        Sedghi, Gupta & Long 2019, The Singular Values of Convolutional Layers.
    """
    kernel = weight.shape[-2:]
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"weight: expected odd kernel sizes, got {tuple(kernel)}")
    sizes = [n + k // 2 for n, k in zip(image_size, kernel, strict=True)]
    # The kernel is real, so that frequencies come in conjugate pairs of equal norms.
    frequencies = [sizes[0], sizes[1] // 2 + 1]
    turns = [
        torch.arange(f, device=weight.device).unsqueeze(-1)
        * torch.arange(k, device=weight.device)
        % n
        for f, k, n in zip(frequencies, kernel, sizes, strict=True)
    ]
    rows, columns = (
        t.to(weight.dtype) * (2 * math.pi / n) for t, n in zip(turns, sizes, strict=True)
    )
    phase = (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    taps = weight.flatten(2).movedim(-1, 0)
    # A + iB is represented by [[A, -B], [B, A]], whose singular values are the same ones, each twice.
    A = torch.einsum("ft,toi->foi", phase.cos(), taps)
    B = torch.einsum("ft,toi->foi", phase.sin(), taps)
    return spectral_norm_bound(
        torch.cat([torch.cat([A, -B], -1), torch.cat([B, A], -1)], -2)
    ).amax()
