"""Linear regressions of posteriordb: y ~ N(X beta, sigma), and the autoregression."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .pieces import f64, flat_positive, flat_real, linear


def regression(
    x: Tensor, y: Tensor, beta_scale: Tensor | None, sigma_prior: dist.TorchDistribution | None
) -> None:
    """y_n ~ N(x_n beta, sigma), beta ~ N(0, beta_scale); None is a flat prior."""
    size = x.shape[-1]
    beta = pyro.sample(
        "beta",
        flat_real(size)
        if beta_scale is None
        else dist.Normal(f64(0.0), beta_scale).expand([size]).to_event(1),
    )
    sigma = pyro.sample("sigma", flat_positive() if sigma_prior is None else sigma_prior)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(linear(x, beta), sigma), obs=y)


def autoregression(lagged: Tensor, y: Tensor) -> None:
    """y_t ~ N(alpha + sum_k beta_k y_{t-k}, sigma): row t of `lagged` has y_{t-1}, y_{t-2}, ..."""
    alpha = pyro.sample("alpha", dist.Normal(f64(0.0), f64(10.0)))
    prior = dist.Normal(f64(0.0), f64(10.0)).expand([lagged.shape[-1]]).to_event(1)
    beta = pyro.sample("beta", prior)
    sigma = pyro.sample("sigma", dist.HalfCauchy(f64(2.5)))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(alpha + linear(lagged, beta), sigma), obs=y)


Arguments = tuple[object, ...]
Data = dict[str, Tensor]


def _columns(*columns: Tensor) -> Tensor:
    """The columns behind an intercept."""
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def ark(data: Data) -> Arguments:
    y, order = data["y"], int(data["K"])
    return y.unfold(0, order, 1)[:-1].flip(-1), y[order:]


def earnings(data: Data) -> Arguments:
    return _columns(data["height"]), data["earn"], None, None


def kidiq(data: Data) -> Arguments:
    return _columns(data["mom_iq"]), data["kid_score"], None, dist.HalfCauchy(f64(2.5))


def mesquite(data: Data) -> Arguments:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    return _columns(*(data[name] for name in names)), data["weight"], None, None


def nes(data: Data) -> Arguments:
    ages = [(data["age_discrete"] == group).double() for group in (2, 3, 4)]
    x = _columns(
        data["real_ideo"], data["race_adj"], *ages, data["educ1"], data["gender"], data["income"]
    )
    return x, data["partyid7"], None, None


def sblrc(data: Data) -> Arguments:
    return data["X"], data["y"], f64(10.0), dist.HalfNormal(f64(10.0))
