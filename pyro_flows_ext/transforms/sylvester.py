"""Sylvester flows (van den Berg, Hasenclever, Tomczak & Welling 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import householder_columns, orthonormal_columns, turned_columns
from ._constrain import MIN_SLOPE, check_positive
from ._low_rank import LowRankTanh, layers
from .conditional import ConditionalFlow


class Sylvester(LowRankTanh):
    """y = x + Q R tanh(R̃ Qᵀx + b), `num_layers` times in a row: what the three kinds share.

    log|det| = Σ_i log(1 + R_ii R̃_ii (1 - tanh²(R̃Qᵀx + b)_i)), exact. Q `(D, M)` has orthonormal columns; R and R̃
    are upper triangular, and the tanh on both diagonals keeps R_ii R̃_ii > -1 for any parameter value. Starts near
    the identity (R ≈ 0).

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters for K layers of rank M <= D: `r` `(K, M, M)` (R on
    and above its diagonal, R̃ below, transposed), `r_tilde_diag`, `b` `(K, M)`, and what the kind needs for Q. Q, QR
    and R̃Qᵀ of all layers come from batched operations.
    Cost: forward O(KDM), plus Q once a call; the inverse adds M scalar roots a layer by back-substitution, since in
    the basis of Q the map is triangular.
    Raises `ValueError` when the last dimension is not D.

    Source: van den Berg et al. 2018, Sylvester Normalizing Flows, eqs. 8, 9 and 13. Their formulas are for column
    vectors and hold here for x as a column; in code the rows of x multiply the transposes.
    """

    kind = ""

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

    def _q(self) -> Tensor:
        """Q of all layers, `(*, K, D, M)` or broadcastable to it."""
        raise TypeError(f"{type(self).__name__} must define _q()")

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
    """

    kind = "orthogonal"

    def __init__(self, input_dim: int, *, rank: int | None = None, num_layers: int = 1):
        super().__init__(input_dim, rank=rank, num_layers=num_layers)
        self.q = nn.Parameter(torch.randn(self.num_layers, self.input_dim, self.rank))

    def _q(self) -> Tensor:
        return orthonormal_columns(self.q)


class HouseholderSylvester(Sylvester):
    """A Sylvester flow whose Q is a product of reflections by the rows of `v` `(K, H, D)`: see `Sylvester`.

    `num_reflections=None` means min(D, 8), the number van den Berg et al. (2018, sec. 4.2) use for D = 64. With
    rank M < D, Q is the first M columns of the product.
    """

    kind = "householder"

    def __init__(
        self,
        input_dim: int,
        *,
        rank: int | None = None,
        num_reflections: int | None = None,
        num_layers: int = 1,
    ):
        super().__init__(input_dim, rank=rank, num_layers=num_layers)
        if num_reflections is None:
            num_reflections = min(self.input_dim, 8)
        self.num_reflections = check_positive("num_reflections", num_reflections)
        self.v = nn.Parameter(torch.randn(self.num_layers, self.num_reflections, self.input_dim))

    def _q(self) -> Tensor:
        return householder_columns(self.v, self.rank)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_reflections={self.num_reflections}"


class TriangularSylvester(Sylvester):
    """A Sylvester flow whose Q alternates between the identity and the flip of all coordinates: see `Sylvester`.

    The first layer's Q is the flip with `flip=True`, and the identity otherwise (van den Berg et al. 2018, sec. 4.3).
    """

    kind = "triangular"

    def __init__(
        self,
        input_dim: int,
        *,
        rank: int | None = None,
        num_layers: int = 1,
        flip: bool = False,
    ):
        super().__init__(input_dim, rank=rank, num_layers=num_layers)
        self.flip = flip

    def _q(self) -> Tensor:
        eye = torch.eye(self.input_dim, dtype=self.b.dtype, device=self.b.device)
        both = torch.stack([eye, eye.flip(0)])[..., : self.rank]
        layer = torch.arange(self.num_layers, device=self.b.device)
        return both[(layer + self.flip) % 2]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, flip={self.flip}"


class ConditionalSylvester(ConditionalFlow):
    """Sylvester layers whose Q, R, R̃ and b depend on a context `(*, C)`: what the three kinds share.

    `.condition(context)` gives the transform. The hyper-network's last layer emits K(M² + 2M) numbers a datum,
    and K D M (orthogonal) or K H D (Householder) more for Q.
    """

    base: type[Sylvester]

    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        rank: int | None = None,
        num_layers: int = 1,
        **options: int,
    ):
        transform = self.base(input_dim, rank=rank, num_layers=num_layers, **options)
        super().__init__(transform, context_dim, hidden_dims)


class ConditionalOrthogonalSylvester(ConditionalSylvester):
    """`OrthogonalSylvester` amortized over a context: see `ConditionalSylvester`.

    The network's h(c) turns the Q of all contexts towards Q + h (`ops.turned_columns`), which it can do to any extent.
    The Q of a free matrix q + h would not do here: square, it is singular for some context as soon as its determinant
    has both signs, and there Q jumps and has an infinite gradient. Cost: D³ a layer and datum.
    """

    base = OrthogonalSylvester

    def _shift(self, name: str, offset: Tensor) -> Tensor:
        if name == "q":
            return turned_columns(orthonormal_columns(self.transform.q), offset)  # type: ignore[arg-type]
        return super()._shift(name, offset)


class ConditionalHouseholderSylvester(ConditionalSylvester):
    """`HouseholderSylvester` amortized over a context; takes `num_reflections`: see `ConditionalSylvester`."""

    base = HouseholderSylvester


class ConditionalTriangularSylvester(ConditionalSylvester):
    """`TriangularSylvester` amortized over a context; takes `flip`: see `ConditionalSylvester`."""

    base = TriangularSylvester


_KINDS = {
    cls.kind: (cls, conditional)
    for cls, conditional in (
        (OrthogonalSylvester, ConditionalOrthogonalSylvester),
        (HouseholderSylvester, ConditionalHouseholderSylvester),
        (TriangularSylvester, ConditionalTriangularSylvester),
    )
}


def sylvester(
    input_dim: int,
    *,
    kind: str = "orthogonal",
    rank: int | None = None,
    num_reflections: int | None = None,
    num_layers: int = 1,
) -> Sylvester:
    """A Sylvester flow of `num_layers` layers; `kind` is "orthogonal", "householder" or "triangular".

    `rank=None` is full rank; `num_reflections` goes with kind "householder" alone. See `Sylvester`.
    """
    cls, _ = _look_up(kind)
    options = _options(kind, num_reflections)
    return cls(input_dim, rank=rank, num_layers=num_layers, **options)


def conditional_sylvester(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    kind: str = "orthogonal",
    rank: int | None = None,
    num_reflections: int | None = None,
    num_layers: int = 1,
) -> ConditionalSylvester:
    """A Sylvester flow amortized over a context: see `sylvester` for the keywords and `ConditionalSylvester`."""
    _, cls = _look_up(kind)
    options = _options(kind, num_reflections)
    return cls(input_dim, context_dim, hidden_dims, rank=rank, num_layers=num_layers, **options)


def _look_up(kind: str) -> tuple[type[Sylvester], type[ConditionalSylvester]]:
    if kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}; got {kind!r}")
    return _KINDS[kind]


def _options(kind: str, num_reflections: int | None) -> dict[str, int]:
    if num_reflections is None:
        return {}
    if kind != "householder":
        raise ValueError(f'num_reflections goes with kind="householder", not with {kind!r}')
    return {"num_reflections": num_reflections}
