"""Normalisation by coordinate: ActNorm and batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import check_event, check_positive
from ..ops.roots import may_branch_on
from .affine import ElementwiseAffine
from .base import FlowTransform

# A column is taken for constant when its standard deviation is below this many units in the last place of its
# largest value: that much is the rounding of its mean. Dividing by it would blow the next batch up.
CONSTANT_ULPS = 10


class ActNorm(ElementwiseAffine):
    """y = loc + exp(log_scale) ⊙ x, an affine map by coordinate that starts from the moments of a batch of data.

    log|det| = Σ log_scale, exact, and the same for every row. The identity until `initialize(batch)` sets `loc` and
    `log_scale`; from then on they are parameters like any other, and no pass depends on the rest of its batch.

    Parameters: `loc`, `log_scale` `(D)`. Buffer: `initialized`, a flag, saved with the rest. Cost: O(D) in both
    directions. Eager training passes with `initialize_on_first_batch=True` read that flag, which synchronises with
    the device; compiled programs do the same by `torch.where`.

    Args:
        input_dim: D, for events `(*, D)`.
        initialize_on_first_batch: whether the first pass in training mode over two rows or more calls `initialize`,
            for its own direction: the inverse pass, and so the data, when a density is trained. Draw no samples before.

    Raises:
        ValueError: if `input_dim` is not positive, or in a pass if the last dimension is not D.

    Example:
        >>> layer = ActNorm(2)
        >>> layer.initialize(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), inverse=True)
        >>> layer.loc.tolist()
        [1.0, 2.0]

    References:
        Kingma & Dhariwal 2018, Glow, sec. 3.1.
    """

    initialized: Tensor

    def __init__(self, input_dim: int, *, initialize_on_first_batch: bool = False):
        super().__init__(input_dim)
        self.initialize_on_first_batch = initialize_on_first_batch
        self.register_buffer("initialized", torch.tensor(False))

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialize_on_first_batch and self.training:
            self._initialize_once(x, inverse=False)
        return super().forward_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialize_on_first_batch and self.training:
            self._initialize_once(y, inverse=True)
        return super().inverse_and_ladj(y)

    @torch.no_grad()
    def initialize(self, batch: Tensor, *, inverse: bool = False) -> None:
        """Sets the parameters so that f(batch), or f⁻¹(batch) with `inverse=True`, has mean 0 and sd 1 by column.

        A column that is constant to rounding (sd at most 10 machine epsilons times its largest value) is centred and
        keeps its scale.

        Args:
            batch: `(*, D)`, two rows or more; the sd divides by their number.
            inverse: for data, which go through the inverse pass in density estimation.

        Raises:
            ValueError: for fewer than two rows, or values that are not finite.
        """
        rows = _rows(batch, self.input_dim)
        if not bool(rows.isfinite().all()):
            raise ValueError("batch: expected finite values, got NaN or infinity")
        loc, log_scale = _standardizing(rows, inverse=inverse)
        self.loc.copy_(loc)
        self.log_scale.copy_(log_scale)
        self.initialized.fill_(True)

    @torch.no_grad()
    def _initialize_once(self, batch: Tensor, *, inverse: bool) -> None:
        """Initializes from the first batch of two rows or more."""
        check_event("batch", batch, self.input_dim)
        if batch.numel() < 2 * self.input_dim:
            return
        if may_branch_on(batch):
            if not bool(self.initialized):
                self.initialize(batch, inverse=inverse)
            return
        loc, log_scale = _standardizing(_rows(batch, self.input_dim), inverse=inverse)
        is_first = ~self.initialized & loc.isfinite().all() & log_scale.isfinite().all()
        self.loc.copy_(torch.where(is_first, loc, self.loc))
        self.log_scale.copy_(torch.where(is_first, log_scale, self.log_scale))
        self.initialized.logical_or_(is_first)


class BatchNorm(FlowTransform):
    """y = m + √(v + ε) ⊙ exp(-γ) ⊙ (x - β): batch normalisation, which takes place in the inverse pass.

    The inverse, data to base, is x = β + exp(γ) ⊙ (y - m) / √(v + ε); log|det| of the forward map is
    Σ ½ log(v + ε) - γ. Starts at the identity, up to ε. In eval mode m and v are the moving statistics, and the map is
    one for all rows, exactly invertible. In training mode the inverse pass takes m and v from its own batch, with
    gradients through them, and moves the moving statistics towards them. Its rows then depend on each other, and its
    log-det by row is that of the map with m and v held fixed: the objective of the papers, but no density of a row.

    Parameters: `beta`, `gamma` `(D)`. Buffers: `moving_mean`, `moving_var` `(D)`. Cost: O(D) in both directions.

    Args:
        input_dim: D, for events `(*, D)`.
        momentum: weight of a batch in the moving statistics, in (0, 1].
        eps: ε > 0.

    Raises:
        ValueError: in a pass, if the last dimension is not D; in training mode for fewer than 2 rows, and in the
            forward direction, which has no batch of data: call `eval()`, or train `.inv`.

    Example:
        >>> x = BatchNorm(2).inv(torch.randn(8, 2))

    References:
        Dinh et al. 2017, Density estimation using Real NVP; with β and γ, Papamakarios et al. 2017, Masked
        Autoregressive Flow for Density Estimation, who replace the moving statistics by those of the whole training
        set before they evaluate: `set_statistics`.
    """

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(self, input_dim: int, *, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.input_dim = D = check_positive("input_dim", input_dim)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: expected a number in (0, 1], got {momentum!r}")
        if not eps > 0:
            raise ValueError(f"eps: expected a positive number, got {eps!r}")
        self.momentum, self.eps = float(momentum), float(eps)
        self.beta = nn.Parameter(torch.zeros(D))
        self.gamma = nn.Parameter(torch.zeros(D))
        self.register_buffer("moving_mean", torch.zeros(D))
        self.register_buffer("moving_var", torch.ones(D))

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("x", x)
        if self.training:
            raise ValueError(
                "BatchNorm: expected eval mode in the forward pass, got training mode, in which the statistics are those "
                "of the batch that enters the inverse pass; call .eval() first, or use .inv"
            )
        log_scale = self._log_scale(self.moving_var)
        y = self.moving_mean + log_scale.exp() * (x - self.beta)
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input("y", y)
        mean, var = self._statistics(y)
        if self.training:
            with torch.no_grad():
                num_rows = y.numel() // self.input_dim
                self.moving_mean.lerp_(mean, self.momentum)
                self.moving_var.lerp_(var * (num_rows / (num_rows - 1)), self.momentum)
        log_scale = self._log_scale(var)
        x = self.beta + (-log_scale).exp() * (y - mean)
        return x, -log_scale.sum(-1).expand(x.shape[:-1])

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns log|det Df(x)| `(*)`; in training mode by the statistics of y, without moving the moving ones."""
        if not self.training:
            return super().log_abs_det_jacobian(x, y)
        if (hit := self._lookup(x=x, y=y)) is not None:
            return hit[2]
        return self._log_scale(self._statistics(y)[1]).sum(-1).expand(y.shape[:-1])

    @torch.no_grad()
    def set_statistics(self, data: Tensor) -> None:
        """Sets the moving statistics to those of `data` `(*, D)`, two rows or more: in place of many training passes."""
        var, mean = torch.var_mean(_rows(data, self.input_dim), 0, correction=1)
        self.moving_mean.copy_(mean)
        self.moving_var.copy_(var)

    def _statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.moving_mean, self.moving_var
        var, mean = torch.var_mean(_rows(y, self.input_dim), 0, correction=0)
        return mean, var

    def _log_scale(self, var: Tensor) -> Tensor:
        return 0.5 * (var + self.eps).log() - self.gamma

    def extra_repr(self) -> str:
        return f"{self.input_dim}, momentum={self.momentum}, eps={self.eps}"


def _rows(batch: Tensor, dim: int) -> Tensor:
    """`batch` `(*, D)` as `(N, D)`; `ValueError` unless N >= 2."""
    check_event("batch", batch, dim)
    rows = batch.reshape(-1, dim)
    if rows.shape[0] < 2:
        raise ValueError(
            f"batch: expected at least 2 rows to take a variance of, got shape {tuple(batch.shape)}"
        )
    return rows


def _standardizing(rows: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """`loc` and `log_scale` `(D)` with which loc + exp(log_scale) x, or its inverse, standardises the columns."""
    var, mean = torch.var_mean(rows, 0, correction=0)
    rounding = CONSTANT_ULPS * torch.finfo(rows.dtype).eps * rows.abs().amax(0)
    is_constant = var <= rounding**2
    log_sd = torch.where(is_constant, 0.0, 0.5 * torch.where(is_constant, 1.0, var).log())
    return (mean, log_sd) if inverse else (-mean * (-log_sd).exp(), -log_sd)
