"""Normalisation by coordinate: ActNorm and batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.roots import may_branch_on
from ._constrain import check_event, check_positive
from .affine import ElementwiseAffine
from .base import FlowTransform

# A column is taken for constant when its standard deviation is below this many units in the last place of its
# largest value: that much is the rounding of its mean. Dividing by it would blow the next batch up.
CONSTANT_ULPS = 10


class ActNorm(ElementwiseAffine):
    """y = loc + exp(log_scale) ⊙ x, an affine map by coordinate that starts from the moments of a batch of data.

    log|det| = Σ log_scale, exact, and the same for every row. The identity until `initialize(batch)` sets `loc` and
    `log_scale`; from then on they are parameters like any other, and no pass depends on the rest of its batch.

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters: `loc`, `log_scale` `(D)`. Buffer: `initialized`, a flag,
    saved with the rest. O(D) in both directions. Raises `ValueError` when the last dimension is not D.

    With `initialize_on_first_batch=True` the first pass in training mode over two rows or more calls `initialize`, for
    its own direction: the inverse pass, and so the data, when a density is trained; whatever comes first, so draw no
    samples before. In compiled programs the same is done by `torch.where` on the flag. Eager training
    passes read that flag, which waits for the device. In eval mode, and by default, passes change nothing.

    Source: Kingma & Dhariwal 2018, Glow, sec. 3.1.
    """

    initialized: Tensor

    def __init__(self, input_dim: int, *, initialize_on_first_batch: bool = False):
        super().__init__(input_dim)
        self.initialize_on_first_batch = initialize_on_first_batch
        self.register_buffer("initialized", torch.tensor(False))

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialize_on_first_batch and self.training:
            self._see(x, inverse=False)
        return super().forward_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.initialize_on_first_batch and self.training:
            self._see(y, inverse=True)
        return super().inverse_and_ladj(y)

    @torch.no_grad()
    def initialize(self, batch: Tensor, *, inverse: bool = False) -> None:
        """Sets the parameters so that f(batch), or f⁻¹(batch) with `inverse=True`, has mean 0 and sd 1 by column.

        `batch` is `(*, D)`; its sd divides by the number of rows. In density estimation the data go through the
        inverse pass. A column that is constant to rounding (sd at most 10 machine epsilons times its largest value)
        is centred and keeps its scale. Raises `ValueError` for fewer than 2 rows and for values that are not finite.
        """
        rows = _rows(batch, self.input_dim)
        if not bool(rows.isfinite().all()):
            raise ValueError("batch: expected finite values, got NaN or infinity")
        loc, log_scale = _standardizing(rows, inverse=inverse)
        self.loc.copy_(loc)
        self.log_scale.copy_(log_scale)
        self.initialized.fill_(True)

    @torch.no_grad()
    def _see(self, batch: Tensor, *, inverse: bool) -> None:
        """Initialises from the first batch of two rows or more."""
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
    Σ ½ log(v + ε) - γ. Starts at the identity, up to ε.

    In eval mode m and v are the moving statistics, and the map is one map for all rows, exactly invertible.
    In training mode the inverse pass takes m and v from its own batch (the variance divides by the number of rows),
    with gradients through them, and moves the moving statistics towards them (there the variance divides by that number
    less one). Its rows then depend on each other, and its log-det is by row that of the map with m and v held fixed,
    not a share of the log-det of the map of the batch: the objective of Dinh et al. and Papamakarios et al., but no
    density of a single row. The forward pass has no batch to take m and v from: in training mode it raises
    `ValueError`, since with the moving statistics it would not invert the inverse. To train the orientation that
    samples by normalising, take `.inv`.

    Shapes: x `(*, D)` -> y `(*, D)`, ladj `(*)`. Parameters: `beta`, `gamma` `(D)`. Buffers: `moving_mean`,
    `moving_var` `(D)`. O(D) in both directions.
    Raises `ValueError` when the last dimension is not D, and in training mode for fewer than 2 rows.

    Source: Dinh et al. 2017, Density estimation using Real NVP; with β and γ, Papamakarios et al. 2017, Masked
    Autoregressive Flow for Density Estimation, who replace the moving statistics by those of the whole training set
    before they evaluate: `set_statistics`.
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
        check_event("x", x, self.input_dim)
        if self.training:
            raise ValueError(
                "BatchNorm: in training mode the statistics are those of the batch that enters the inverse pass, "
                "and the forward pass has none; call .eval() first, or use .inv"
            )
        log_scale = self._log_scale(self.moving_var)
        y = self.moving_mean + log_scale.exp() * (x - self.beta)
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        check_event("y", y, self.input_dim)
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
        """log|det Df(x)|, shape `(*)`; in training mode by the statistics of y, and these move nothing."""
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


def actnorm(input_dim: int, *, initialize_on_first_batch: bool = False) -> ActNorm:
    """An affine map by coordinate that starts from the moments of a batch: see `ActNorm`."""
    return ActNorm(input_dim, initialize_on_first_batch=initialize_on_first_batch)


def batchnorm(input_dim: int, *, momentum: float = 0.1, eps: float = 1e-5) -> BatchNorm:
    """Batch normalisation in the inverse pass: see `BatchNorm`."""
    return BatchNorm(input_dim, momentum=momentum, eps=eps)
