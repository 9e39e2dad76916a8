"""Eight models written without a thought for particles, with simulated data: `alpha[group]`, `X @ w`, `beta[0]`.

`load(name)` gives a model and its arguments; `plain_numpyro.py` has the same models for NumPyro. Data and latents are
float32, torch's default. The data are drawn from the model at fixed parameters, by a seed of their own.

    varying_slopes      intercepts and slopes of 30 groups, 300 rows
    negative_binomial   counts of 300 rows by 5 covariates and an intercept
    autoregression      AR(2), 200 times
    mixture             two normal components of 200 rows, summed out
    gaussian_process    60 points, marginal likelihood
    item_response       400 persons, 100 items, three quarters of their answers
    horseshoe           100 rows, 20 covariates, 3 of which count
    missing             a regression of 150 rows on two covariates, 15 values of one missing
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def varying_slopes(group: Tensor, x: Tensor, y: Tensor) -> None:
    """y_n ~ N(alpha[g_n] + beta[g_n] x_n, sigma), both normal over groups."""
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(0.0, 5.0))
    mu_beta = pyro.sample("mu_beta", dist.Normal(0.0, 5.0))
    tau_alpha = pyro.sample("tau_alpha", dist.HalfNormal(2.0))
    tau_beta = pyro.sample("tau_beta", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("groups", 30):
        alpha = pyro.sample("alpha", dist.Normal(mu_alpha, tau_alpha))
        beta = pyro.sample("beta", dist.Normal(mu_beta, tau_beta))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(alpha[group] + beta[group] * x, sigma), obs=y)


def negative_binomial(X: Tensor, y: Tensor) -> None:
    """y_n negative binomial with mean exp(alpha + x_n w) and concentration phi."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(X.shape[1]), 1.0).to_event(1))
    phi = pyro.sample("phi", dist.Gamma(2.0, 1.0))
    mean = torch.exp(alpha + X @ w)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.GammaPoisson(phi, phi / mean), obs=y)


def autoregression(y: Tensor) -> None:
    """y_t ~ N(c + a_1 y_{t-1} + a_2 y_{t-2}, sigma)."""
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    mean = c + a[0] * y[1:-1] + a[1] * y[:-2]
    with pyro.plate("times", len(y) - 2):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y[2:])


def mixture(y: Tensor) -> None:
    """y_n ~ w N(mu, sigma_1) + (1 - w) N(mu + gap, sigma_2), the component summed out."""
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    gap = pyro.sample("gap", dist.HalfNormal(3.0))
    sigma = pyro.sample("sigma", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    low = torch.log(w) + dist.Normal(mu, sigma[0]).log_prob(y)
    high = torch.log1p(-w) + dist.Normal(mu + gap, sigma[1]).log_prob(y)
    pyro.factor("y", torch.logaddexp(low, high).sum())


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """y ~ N(0, K + noise² I), K_ij = amplitude² exp(-(x_i - x_j)² / (2 length²))."""
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(2.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    K = amplitude**2 * torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
    K = K + (noise**2 + 1e-4) * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), K), obs=y)


def item_response(person: Tensor, item: Tensor, y: Tensor) -> None:
    """y_n ~ Bernoulli(σ(scale ability[person_n] - difficulty[item_n]))."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("persons", 400):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("items", 100):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 2.0))
    with pyro.plate("answers", len(y)):
        logits = scale * ability[person] - difficulty[item]
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def horseshoe(X: Tensor, y: Tensor) -> None:
    """y_n ~ N(alpha + x_n w, sigma), w_d = z_d tau lam_d with half-Cauchy tau and lam_d."""
    D = X.shape[1]
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    lam = pyro.sample("lam", dist.HalfCauchy(torch.ones(D)).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    w = z * tau * lam
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(alpha + X @ w, sigma), obs=y)


def missing(x: Tensor, z: Tensor, y: Tensor) -> None:
    """y_n ~ N(alpha + beta x_n + gamma z_n, sigma), x_n ~ N(mu, tau); the missing x, which are NaN, are latents."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 2.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
    gamma = pyro.sample("gamma", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    is_missing = torch.isnan(x)
    with pyro.plate("unseen", int(is_missing.sum())):
        x_missing = pyro.sample("x_missing", dist.Normal(mu, tau))
    x_full = x.clone()
    x_full[is_missing] = x_missing
    with pyro.plate("seen", int((~is_missing).sum())):
        pyro.sample("x", dist.Normal(mu, tau), obs=x[~is_missing])
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta * x_full + gamma * z, sigma), obs=y)


# --- data ---


def _varying_slopes(rng: np.random.Generator) -> list[Array]:
    group, x = rng.integers(30, size=300), rng.normal(size=300)
    alpha, beta = 1 + 0.7 * rng.normal(size=30), -0.5 + 0.4 * rng.normal(size=30)
    return [group, x, alpha[group] + beta[group] * x + 0.8 * rng.normal(size=300)]


def _negative_binomial(rng: np.random.Generator) -> list[Array]:
    X = rng.normal(size=(300, 5))
    mean = np.exp(1 + X @ np.array([0.5, -0.4, 0.3, 0.0, 0.1]))
    return [X, rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(float)]


def _autoregression(rng: np.random.Generator) -> list[Array]:
    y = np.zeros(250)
    for t in range(2, 250):
        y[t] = 0.3 + 0.6 * y[t - 1] + 0.25 * y[t - 2] + 0.5 * rng.normal()
    return [y[50:]]


def _mixture(rng: np.random.Generator) -> list[Array]:
    is_low = rng.random(200) < 0.35
    return [np.where(is_low, -1 + 0.6 * rng.normal(size=200), 1.2 + rng.normal(size=200))]


def _gaussian_process(rng: np.random.Generator) -> list[Array]:
    x = np.sort(rng.uniform(-4, 4, size=60))
    return [x, np.sin(1.5 * x) + 0.3 * rng.normal(size=60)]


def _item_response(rng: np.random.Generator) -> list[Array]:
    person, item = np.divmod(np.flatnonzero(rng.random(40_000) < 0.75), 100)
    ability, difficulty = rng.normal(size=400), 1.2 * rng.normal(size=100)
    logits = 1.3 * ability[person] - difficulty[item]
    return [person, item, (rng.random(len(item)) < 1 / (1 + np.exp(-logits))).astype(float)]


def _horseshoe(rng: np.random.Generator) -> list[Array]:
    X = rng.normal(size=(100, 20))
    w = np.zeros(20)
    w[:3] = 2.0, -1.5, 1.0
    return [X, 0.5 + X @ w + rng.normal(size=100)]


def _missing(rng: np.random.Generator) -> list[Array]:
    x, z = 0.5 + 1.2 * rng.normal(size=150), rng.normal(size=150)
    y = 1 + 0.8 * x - 0.5 * z + 0.7 * rng.normal(size=150)
    x[rng.choice(150, size=15, replace=False)] = np.nan
    return [x, z, y]


def _shrunken_weights(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, and scales as logarithms: half-Cauchy scales have no variance."""
    tau, lam = samples["tau"], samples["lam"]
    return {
        "w": samples["z"] * tau[:, None] * lam,
        "log_tau": tau.log(),
        "log_lam": lam.log(),
        "alpha": samples["alpha"],
        "sigma": samples["sigma"],
    }


def _identity(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    return samples


@dataclass(frozen=True)
class PlainModel:
    """`model(*args)`, with `dim` unconstrained latents; `to_parameters` takes samples to the quantities to compare."""

    model: Callable[..., None]
    simulate: Callable[[np.random.Generator], list[Array]]
    dim: int
    to_parameters: Callable[[dict[str, Tensor]], dict[str, Tensor]] = _identity


PLAIN_MODELS = {
    "varying_slopes": PlainModel(varying_slopes, _varying_slopes, 65),
    "negative_binomial": PlainModel(negative_binomial, _negative_binomial, 7),
    "autoregression": PlainModel(autoregression, _autoregression, 4),
    "mixture": PlainModel(mixture, _mixture, 5),
    "gaussian_process": PlainModel(gaussian_process, _gaussian_process, 3),
    "item_response": PlainModel(item_response, _item_response, 501),
    "horseshoe": PlainModel(horseshoe, _horseshoe, 43, _shrunken_weights),
    "missing": PlainModel(missing, _missing, 21),
}


def arguments(name: str) -> tuple[Tensor, ...]:
    """The simulated data: floating point numbers in float32, indices in int64."""
    arrays = PLAIN_MODELS[name].simulate(np.random.default_rng(1))
    return tuple(
        torch.as_tensor(a, dtype=torch.float32 if a.dtype.kind == "f" else torch.int64)
        for a in arrays
    )
