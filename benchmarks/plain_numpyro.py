"""The models of `plain_models.py` for NumPyro: same priors, same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import sample

Array = Any


def varying_slopes(group: Array, x: Array, y: Array) -> None:
    mu_alpha = sample("mu_alpha", dist.Normal(0.0, 5.0))
    mu_beta = sample("mu_beta", dist.Normal(0.0, 5.0))
    tau_alpha = sample("tau_alpha", dist.HalfNormal(2.0))
    tau_beta = sample("tau_beta", dist.HalfNormal(2.0))
    sigma = sample("sigma", dist.HalfNormal(2.0))
    with numpyro.plate("groups", 30):
        alpha = sample("alpha", dist.Normal(mu_alpha, tau_alpha))
        beta = sample("beta", dist.Normal(mu_beta, tau_beta))
    with numpyro.plate("rows", len(y)):
        sample("y", dist.Normal(alpha[group] + beta[group] * x, sigma), obs=y)


def negative_binomial(X: Array, y: Array) -> None:
    alpha = sample("alpha", dist.Normal(0.0, 2.0))
    w = sample("w", dist.Normal(jnp.zeros(X.shape[1]), 1.0).to_event(1))
    phi = sample("phi", dist.Gamma(2.0, 1.0))
    mean = jnp.exp(alpha + X @ w)
    with numpyro.plate("rows", len(y)):
        sample("y", dist.GammaPoisson(phi, phi / mean), obs=y)


def autoregression(y: Array) -> None:
    c = sample("c", dist.Normal(0.0, 1.0))
    a = sample("a", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    sigma = sample("sigma", dist.HalfNormal(2.0))
    mean = c + a[0] * y[1:-1] + a[1] * y[:-2]
    with numpyro.plate("times", len(y) - 2):
        sample("y", dist.Normal(mean, sigma), obs=y[2:])


def mixture(y: Array) -> None:
    w = sample("w", dist.Beta(2.0, 2.0))
    mu = sample("mu", dist.Normal(0.0, 3.0))
    gap = sample("gap", dist.HalfNormal(3.0))
    sigma = sample("sigma", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
    low = jnp.log(w) + dist.Normal(mu, sigma[0]).log_prob(y)
    high = jnp.log1p(-w) + dist.Normal(mu + gap, sigma[1]).log_prob(y)
    numpyro.factor("y", jnp.logaddexp(low, high).sum())


def gaussian_process(x: Array, y: Array) -> None:
    length = sample("length", dist.LogNormal(0.0, 1.0))
    amplitude = sample("amplitude", dist.HalfNormal(2.0))
    noise = sample("noise", dist.HalfNormal(1.0))
    K = amplitude**2 * jnp.exp(-0.5 * ((x[:, None] - x) / length) ** 2)
    K = K + (noise**2 + 1e-4) * jnp.eye(len(x))
    sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), K), obs=y)


def item_response(person: Array, item: Array, y: Array) -> None:
    scale = sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("persons", 400):
        ability = sample("ability", dist.Normal(0.0, 1.0))
    with numpyro.plate("items", 100):
        difficulty = sample("difficulty", dist.Normal(0.0, 2.0))
    with numpyro.plate("answers", len(y)):
        sample("y", dist.Bernoulli(logits=scale * ability[person] - difficulty[item]), obs=y)


def horseshoe(X: Array, y: Array) -> None:
    D = X.shape[1]
    tau = sample("tau", dist.HalfCauchy(1.0))
    lam = sample("lam", dist.HalfCauchy(jnp.ones(D)).to_event(1))
    z = sample("z", dist.Normal(jnp.zeros(D), 1.0).to_event(1))
    alpha = sample("alpha", dist.Normal(0.0, 2.0))
    sigma = sample("sigma", dist.HalfNormal(2.0))
    w = numpyro.deterministic("w", z * tau * lam)
    numpyro.deterministic("log_tau", jnp.log(tau))
    numpyro.deterministic("log_lam", jnp.log(lam))
    with numpyro.plate("rows", len(y)):
        sample("y", dist.Normal(alpha + X @ w, sigma), obs=y)


def missing(x: Array, z: Array, y: Array) -> None:
    alpha = sample("alpha", dist.Normal(0.0, 2.0))
    beta = sample("beta", dist.Normal(0.0, 2.0))
    gamma = sample("gamma", dist.Normal(0.0, 2.0))
    sigma = sample("sigma", dist.HalfNormal(2.0))
    mu = sample("mu", dist.Normal(0.0, 2.0))
    tau = sample("tau", dist.HalfNormal(2.0))
    (unseen,) = np.nonzero(np.isnan(x))
    (seen,) = np.nonzero(~np.isnan(x))
    with numpyro.plate("unseen", len(unseen)):
        x_missing = sample("x_missing", dist.Normal(mu, tau))
    with numpyro.plate("seen", len(seen)):
        sample("x", dist.Normal(mu, tau), obs=x[seen])
    x_full = jnp.asarray(x).at[unseen].set(x_missing)
    with numpyro.plate("rows", len(y)):
        sample("y", dist.Normal(alpha + beta * x_full + gamma * z, sigma), obs=y)


MODELS: dict[str, Callable[..., None]] = {
    model.__name__: model
    for model in (
        varying_slopes,
        negative_binomial,
        autoregression,
        mixture,
        gaussian_process,
        item_response,
        horseshoe,
        missing,
    )
}
