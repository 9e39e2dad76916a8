"""Posteriors of posteriordb (Magnusson et al. 2024), with their gold-standard draws by Stan.

Constraints are Stan's, and so are the unconstrained densities, up to a constant: priors on a half-line are normalised
here and half as large in Stan. Stan's flat priors are `pieces.flat`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor

from . import regressions
from .ode import lotka_volterra, michaelis_menten
from .pieces import f64, fill_plate, flat, flat_positive, half_student, linear, require
from .target import Reference, Samples, Target, data_root, read_npz

Data = dict[str, Tensor]


def schools_centered(y: Tensor, sigma: Tensor) -> None:
    """theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j)."""
    mu = pyro.sample("mu", dist.Normal(f64(0.0), f64(5.0)))
    tau = pyro.sample("tau", dist.HalfCauchy(f64(5.0)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """theta_trans_j ~ N(0, 1), y_j ~ N(mu + tau theta_trans_j, sigma_j)."""
    mu = pyro.sample("mu", dist.Normal(f64(0.0), f64(5.0)))
    tau = pyro.sample("tau", dist.HalfCauchy(f64(5.0)))
    with pyro.plate("schools", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(f64(0.0), f64(1.0)))
        pyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma), obs=y)


def gp_regression(squared_distances: Tensor, y: Tensor) -> None:
    """y ~ N(0, K + sigma I), K_ij = alpha² exp(-(x_i - x_j)² / (2 rho²)): sigma is a variance."""
    rho = pyro.sample("rho", dist.Gamma(f64(25.0), f64(4.0)))
    alpha = pyro.sample("alpha", dist.HalfNormal(f64(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(f64(1.0)))
    rho, alpha, sigma = (v[..., None, None] for v in (rho, alpha, sigma))
    eye = torch.eye(len(y), dtype=y.dtype, device=y.device)
    cov = alpha.square() * (-0.5 * squared_distances / rho.square()).exp() + sigma * eye
    scale_tril, info = torch.linalg.cholesky_ex(cov)
    ok = info == 0
    if not bool(ok.all()):  # again, with a graph that has no NaN in it
        scale_tril = torch.linalg.cholesky(cov.where(ok[..., None, None], eye))
    require("positive_definite", ok)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), scale_tril=scale_tril), obs=y)


def mixture(y: Tensor) -> None:
    """y_n ~ theta N(mu_1, sigma_1) + (1 - theta) N(mu_2, sigma_2), mu_1 < mu_2 both N(0, 2)."""
    normal = dist.Normal(f64(0.0), f64(1.0)).expand([2]).to_event(1)
    mu = pyro.sample("mu", flat(dist.TransformedDistribution(normal, [OrderedTransform()])))
    log_prior = dist.Normal(f64(0.0), f64(2.0)).log_prob(mu).sum(-1)
    pyro.factor("mu_prior", log_prior + math.log(2))  # normalised on the ordered half
    sigma = pyro.sample("sigma", dist.HalfNormal(f64(2.0)).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(f64(5.0), f64(5.0)))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def hare_and_lynx(y: Tensor) -> None:
    """log y_t ~ N(log z(t), sigma) for prey and predator, t = 0 ... n - 1, z by Lotka and Volterra."""
    loc, scale = f64([1.0, 0.05, 1.0, 0.05]), f64([0.5, 0.05, 0.5, 0.05])
    prior = dist.Normal(loc, scale)
    theta = pyro.sample("theta", flat_positive(4))
    # Normal, restricted to the positive numbers and normalised there.
    log_half_line = (1 - prior.cdf(f64(0.0))).log()
    pyro.factor("theta_prior", (prior.log_prob(theta) - log_half_line).sum(-1))
    initial = dist.LogNormal(f64(10.0).log(), f64(1.0)).expand([2]).to_event(1)
    z_init = pyro.sample("z_init", initial)
    sigma = pyro.sample("sigma", dist.LogNormal(f64(-1.0), f64(1.0)).expand([2]).to_event(1))
    log_z = lotka_volterra(torch.cat([theta, z_init.log()], -1), len(y) - 1)
    ok = log_z.isfinite().flatten(-2).all(-1)
    require("solved", ok)
    log_z = fill_plate(log_z.where(ok[..., None, None], f64(0.0)), 1)
    with pyro.plate("years", len(y)):
        pyro.sample("y", dist.LogNormal(log_z, sigma).to_event(1), obs=y)


def elimination(times: Tensor, concentration: Tensor, dose: float, volume: float) -> None:
    """log concentration_t ~ N(log C(t), sigma), C absorbed at first order and eliminated by Michaelis and Menten."""
    rates = [pyro.sample(name, dist.HalfCauchy(f64(1.0))) for name in ("k_a", "K_m", "V_m")]
    sigma = pyro.sample("sigma", dist.HalfCauchy(f64(1.0)))
    c = michaelis_menten(torch.stack(rates, -1), times.numpy(), dose, volume).squeeze(-1)
    ok = (c > 0).all(-1)  # not so for NaN
    require("solved", ok)
    log_c = fill_plate(c.where(ok[..., None], f64(1.0)).log())
    with pyro.plate("times", len(times)):
        pyro.sample("concentration", dist.LogNormal(log_c, sigma), obs=concentration)


def motorcycle(
    x: Tensor, frequencies: Tensor, x_sigma: Tensor, frequencies_sigma: Tensor, y: Tensor
) -> None:
    """y_n ~ N(m(t_n), exp(s(t_n))), m and s Gaussian processes in the eigenbasis of the Laplacian.

    Basis `x` `(n, B)` with `frequencies` `(B)`; amplitude, length scale and `zgp` of each process are latent.
    """

    def process(suffix: str, basis: Tensor, omega: Tensor, loc: float, scale: float) -> Tensor:
        prior = dist.StudentT(f64(3.0), f64(loc), f64(scale))
        intercept = pyro.sample(f"Intercept{suffix}", prior)
        amplitude = pyro.sample(f"sdgp{suffix}_1", half_student(3.0, 36.0))
        lengthscale = pyro.sample(
            f"lscale{suffix}_1", dist.InverseGamma(f64(1.124909), f64(0.0177))
        )
        standard = dist.Normal(f64(0.0), f64(1.0)).expand([len(omega)]).to_event(1)
        z = pyro.sample(f"zgp{suffix}_1", standard)
        # The root of the spectral density of the squared exponential kernel.
        root = (
            amplitude.unsqueeze(-1)
            * (math.sqrt(2 * math.pi) * lengthscale).sqrt().unsqueeze(-1)
            * (-0.25 * lengthscale.unsqueeze(-1).square() * omega.square()).exp()
        )
        return intercept + linear(basis, root * z)

    mean = process("", x, frequencies, -13.0, 36.0)
    log_sd = process("_sigma", x_sigma, frequencies_sigma, 0.0, 10.0)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, log_sd.exp()), obs=y)


# --- from Stan's data to arguments ---


def _schools(data: Data) -> tuple[Any, ...]:
    return data["y"], data["sigma"]


def _gp(data: Data) -> tuple[Any, ...]:
    return (data["x"].unsqueeze(-1) - data["x"]).square(), data["y"]


def _mixture(data: Data) -> tuple[Any, ...]:
    return (data["y"],)


def _hare_and_lynx(data: Data) -> tuple[Any, ...]:
    if data["ts"].tolist() != list(range(1, len(data["ts"]) + 1)):
        raise ValueError(f"ts: expected the years 1, 2, ..., got {data['ts'].tolist()}")
    return (torch.cat([data["y_init"].unsqueeze(0), data["y"]]),)


def _elimination(data: Data) -> tuple[Any, ...]:
    if data["t0"] != 0:
        raise ValueError(f"t0: expected 0, got {float(data['t0'])}")
    return data["times"], data["C_hat"], float(data["D"]), float(data["V"])


def _motorcycle(data: Data) -> tuple[Any, ...]:
    return (
        data["Xgp_1"],
        data["slambda_1"].squeeze(-1),
        data["Xgp_sigma_1"],
        data["slambda_sigma_1"].squeeze(-1),
        data["Y"],
    )


def _theta_of(samples: Samples) -> Samples:
    """The reference has theta, the model theta_trans."""
    mu, tau = samples["mu"].unsqueeze(-1), samples["tau"].unsqueeze(-1)
    return {**samples, "theta": mu + tau * samples["theta_trans"]}


def _theta_trans_of(parameters: Samples) -> Samples:
    mu, tau = parameters["mu"].unsqueeze(-1), parameters["tau"].unsqueeze(-1)
    return {**parameters, "theta_trans": (parameters["theta"] - mu) / tau}


def _read(
    name: str,
    model: Callable[..., Any],
    arguments: Callable[[Data], tuple[Any, ...]],
    **parametrisation: Any,
) -> Target:
    folder = data_root() / "posteriordb" / name
    raw = json.loads((folder / "data.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    moments = summary["parameters"]
    draws = folder / "reference.npz"
    reference = Reference(
        mean={key: value["mean"] for key, value in moments.items()},
        sd={key: value["sd"] for key, value in moments.items()},
        parameters=read_npz(draws) if draws.exists() else None,
        origin="posteriordb: Stan's NUTS, 10,000 draws",
    )
    data = {key: f64(value) for key, value in raw.items()}
    dim = summary["unconstrained_dim"]
    return Target(name, model, arguments(data), dim, reference, **parametrisation)


_MODELS: dict[str, tuple[Callable[..., Any], Callable[[Data], tuple[Any, ...]]]] = {
    "arK-arK": (regressions.autoregression, regressions.ark),
    "earnings-earn_height": (regressions.regression, regressions.earnings),
    "eight_schools-eight_schools_centered": (schools_centered, _schools),
    "eight_schools-eight_schools_noncentered": (schools_noncentered, _schools),
    "gp_pois_regr-gp_regr": (gp_regression, _gp),
    "hudson_lynx_hare-lotka_volterra": (hare_and_lynx, _hare_and_lynx),
    "kidiq-kidscore_momiq": (regressions.regression, regressions.kidiq),
    "low_dim_gauss_mix-low_dim_gauss_mix": (mixture, _mixture),
    "mcycle_gp-accel_gp": (motorcycle, _motorcycle),
    "mesquite-mesquite": (regressions.regression, regressions.mesquite),
    "nes1980-nes": (regressions.regression, regressions.nes),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": (elimination, _elimination),
    "sblrc-blr": (regressions.regression, regressions.sblrc),
}

_PARAMETRISATION: dict[str, dict[str, Any]] = {
    "eight_schools-eight_schools_noncentered": {
        "to_parameters": _theta_of,
        "from_parameters": _theta_trans_of,
    }
}

TARGETS: dict[str, Callable[[], Target]] = {
    name: partial(_read, name, model, arguments, **_PARAMETRISATION.get(name, {}))
    for name, (model, arguments) in _MODELS.items()
}
