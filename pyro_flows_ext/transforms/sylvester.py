"""Sylvester flows (van den Berg, Hasenclever, Tomczak & Welling 2018)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..ops import check_positive, householder_columns, orthonormal_columns, turned_columns
from .bounds import MIN_SLOPE
from .low_rank import LowRankTanh, layers


class SylvesterOptions(TypedDict, total=False):
    """Keywords that all Sylvester flows share: see `Sylvester`."""

    rank: int | None
    num_layers: int
    context_dim: int
    hidden_dims: Sequence[int] | None


class Sylvester(LowRankTanh):
    """y = x + Q R tanh(R̃ Qᵀx + b), `num_layers` times in a row: the common base of the three kinds.

    log|det| = Σ_i log(1 + R_ii R̃_ii (1 - tanh²(R̃Qᵀx + b)_i)), exact. Q `(D, M)` has orthonormal columns; R and R̃
    are upper triangular, and the tanh on both diagonals keeps R_ii R̃_ii > -1 for any parameter value. Starts near
    the identity (R ≈ 0).

    Parameters of K layers: `r` `(K, M, M)` (R on and above its diagonal, R̃ below, transposed), `r_tilde_diag`, `b`
    `(K, M)`, and those of the kind for Q. Cost: forward O(KDM), plus Q once a call; the inverse adds M scalar roots
    a layer by back-substitution, since in the basis of Q the map is triangular.

    Args:
        input_dim: D, for events `(*, D)`.
        rank: M <= D; D by default.
        num_layers: K, the number of layers.
        context_dim: number of context variables that Q, R, R̃ and b depend on.
        hidden_dims: widths of the network that reads the context; `(64, 64)` by default, `()` for a linear map.

    Raises:
        ValueError: if `rank` exceeds D, or in a pass if the last dimension is not D.

    References:
        van den Berg et al. 2018, Sylvester Normalizing Flows, eqs. 8, 9 and 13. Their formulas are for column
        vectors and hold here for x as a column; in code the rows of x multiply the transposes.
    """

    def __init__(self, input_dim: int, *, rank: int | None = None, num_layers: int = 1):
        super().__init__(input_dim, num_layers)
        self.rank = M = check_positive("rank", input_dim if rank is None else rank)
        if input_dim < M:
            raise ValueError(f"rank: expected at most input_dim = {input_dim}, got {M}")
        K = self.num_layers
        scale = 0.01 * torch.ones(M, M).triu() + 0.1 * torch.ones(M, M).tril(-1)
        self.r = nn.Parameter(scale * torch.randn(K, M, M) / M**0.5)
        self.r_tilde_diag = nn.Parameter(torch.ones(K, M))
        self.b = nn.Parameter(0.1 * torch.randn(K, M))

    @abstractmethod
    def _q(self) -> Tensor:
        """Q of all layers, `(*, K, D, M)` or broadcastable to it."""

    def _factors(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor]:
        Q = self._q()
        R = _triangular(self.r, self.r.diagonal(dim1=-2, dim2=-1))
        R_tilde = _triangular(self.r.mT, self.r_tilde_diag)
        k = R.diagonal(dim1=-2, dim2=-1) * R_tilde.diagonal(dim1=-2, dim2=-1)
        # AB = R̃QᵀQR = R̃R, upper triangular.
        return layers(R_tilde @ Q.mT, -3), layers((Q @ R).mT, -3), k

    def extra_repr(self) -> str:
        return f"{self.input_dim}, rank={self.rank}, num_layers={self.num_layers}"


def _triangular(raw: Tensor, diagonal: Tensor) -> Tensor:
    """The strict upper triangle of `raw`, with a diagonal in (-√(1 - δ), √(1 - δ)): no slope falls below δ."""
    return raw.triu(1) + torch.diag_embed((1 - MIN_SLOPE) ** 0.5 * diagonal.tanh())


class OrthogonalSylvester(Sylvester):
    """A Sylvester flow whose Q is the orthonormal factor of a free matrix `q` `(K, D, M)`: see `Sylvester`.

    Reduced QR in place of the iteration of van den Berg et al. (2018, eq. 14): exact to machine precision, and faster.

    With a context, the network turns the Q of all contexts towards Q + h(c) (`ops.turned_columns`), which it can do to
    any extent, at O(D³) a layer and datum. The factor of a free matrix q + h(c) would not do: a square one is singular
    for some context as soon as its determinant has both signs, and there Q jumps and has an infinite gradient.

    Example:
        >>> OrthogonalSylvester(4, rank=2, num_layers=3)
        OrthogonalSylvester(4, rank=2, num_layers=3)
    """

    def __init__(
        self,
        input_dim: int,
        *,
        rank: int | None = None,
        num_layers: int = 1,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__(input_dim, rank=rank, num_layers=num_layers)
        self.q = nn.Parameter(torch.randn(self.num_layers, self.input_dim, self.rank))
        self.add_hyper_network(context_dim, hidden_dims)

    def _q(self) -> Tensor:
        return orthonormal_columns(self.q)

    def _shifted(self, name: str, offset: Tensor) -> Tensor:
        if name == "q":
            return turned_columns(orthonormal_columns(self.q), offset)
        return super()._shifted(name, offset)


class HouseholderSylvester(Sylvester):
    """A Sylvester flow whose Q is a product of reflections by the rows of `v` `(K, H, D)`: see `Sylvester`.

    With rank M < D, Q is the first M columns of the product. Q is a smooth function of a context, too.

    Args:
        num_reflections: H; min(D, 8) by default, the number that van den Berg et al. (2018, sec. 4.2) use for D = 64.

    Example:
        >>> HouseholderSylvester(4, num_reflections=2)
        HouseholderSylvester(4, rank=4, num_layers=1, num_reflections=2)
    """

    def __init__(
        self,
        input_dim: int,
        *,
        rank: int | None = None,
        num_reflections: int | None = None,
        num_layers: int = 1,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__(input_dim, rank=rank, num_layers=num_layers)
        if num_reflections is None:
            num_reflections = min(self.input_dim, 8)
        self.num_reflections = check_positive("num_reflections", num_reflections)
        self.v = nn.Parameter(torch.randn(self.num_layers, self.num_reflections, self.input_dim))
        self.add_hyper_network(context_dim, hidden_dims)

    def _q(self) -> Tensor:
        return householder_columns(self.v, self.rank)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_reflections={self.num_reflections}"


class TriangularSylvester(Sylvester):
    """A Sylvester flow whose Q alternates between the identity and the flip of all coordinates: see `Sylvester`.

    Args:
        flip: whether the first layer's Q is the flip (van den Berg et al. 2018, sec. 4.3).

    Example:
        >>> TriangularSylvester(4, num_layers=2)
        TriangularSylvester(4, rank=4, num_layers=2, flip=False)
    """

    def __init__(
        self,
        input_dim: int,
        *,
        rank: int | None = None,
        num_layers: int = 1,
        flip: bool = False,
        context_dim: int = 0,
        hidden_dims: Sequence[int] | None = None,
    ):
        super().__init__(input_dim, rank=rank, num_layers=num_layers)
        self.flip = flip
        self.add_hyper_network(context_dim, hidden_dims)

    def _q(self) -> Tensor:
        eye = torch.eye(self.input_dim, dtype=self.b.dtype, device=self.b.device)
        both = torch.stack([eye, eye.flip(0)])[..., : self.rank]
        layer = torch.arange(self.num_layers, device=self.b.device)
        return both[(layer + self.flip) % 2]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, flip={self.flip}"


_KINDS: dict[str, Callable[..., Sylvester]] = {
    "orthogonal": OrthogonalSylvester,
    "householder": HouseholderSylvester,
    "triangular": TriangularSylvester,
}


def sylvester(
    input_dim: int,
    *,
    kind: str = "orthogonal",
    num_reflections: int | None = None,
    **options: Unpack[SylvesterOptions],
) -> Sylvester:
    """Returns a Sylvester flow of one kind.

    Args:
        input_dim: D, for events `(*, D)`.
        kind: "orthogonal", "householder" or "triangular".
        num_reflections: for kind "householder" only.
        options: as in `Sylvester`.

    Raises:
        ValueError: if `kind` is not one of the three, or `num_reflections` comes with another kind.

    Example:
        >>> sylvester(4, kind="triangular", rank=2)
        TriangularSylvester(4, rank=2, num_layers=1, flip=False)
    """
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}; got {kind!r}")
    if kind == "householder":
        return HouseholderSylvester(input_dim, num_reflections=num_reflections, **options)
    if num_reflections is not None:
        raise ValueError(
            f'num_reflections: expected None unless kind="householder", got kind={kind!r}'
        )
    return _KINDS[kind](input_dim, **options)
