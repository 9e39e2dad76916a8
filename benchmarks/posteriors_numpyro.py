"""The sixteen posteriors of `targets` for NumPyro: same priors, same arguments, same names.

Priors that differ between posteriors of one form are bound in `MODELS`. ODEs run in Runge-Kutta steps on the same grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import sample
from numpyro.distributions import constraints

Array = Any


def flat_real(size: int) -> dist.Distribution:
    return dist.ImproperUniform(constraints.real, (), (size,))


def flat_positive() -> dist.Distribution:
    return dist.ImproperUniform(constraints.positive, (), ())


def regression(
    x: Array, y: Array, *, beta_scale: float | None, sigma_prior: dist.Distribution | None
) -> None:
    size = x.shape[-1]
    normal = None if beta_scale is None else dist.Normal(0.0, beta_scale).expand([size]).to_event(1)
    beta = sample("beta", flat_real(size) if normal is None else normal)
    sigma = sample("sigma", flat_positive() if sigma_prior is None else sigma_prior)
    with numpyro.plate("rows", len(y)):
        sample("y", dist.Normal(x @ beta, sigma), obs=y)


def autoregression(lagged: Array, y: Array) -> None:
    alpha = sample("alpha", dist.Normal(0.0, 10.0))
    beta = sample("beta", dist.Normal(0.0, 10.0).expand([lagged.shape[-1]]).to_event(1))
    sigma = sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("times", len(y)):
        sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y)


def schools_centered(y: Array, sigma: Array) -> None:
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta = sample("theta", dist.Normal(mu, tau))
        sample("y", dist.Normal(theta, sigma), obs=y)


def schools_noncentered(y: Array, sigma: Array) -> None:
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", len(y)):
        theta_trans = sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        sample("y", dist.Normal(theta, sigma), obs=y)


def gp_regression(squared_distances: Array, y: Array) -> None:
    rho = sample("rho", dist.Gamma(25.0, 4.0))
    alpha = sample("alpha", dist.HalfNormal(2.0))
    sigma = sample("sigma", dist.HalfNormal(1.0))
    K = alpha**2 * jnp.exp(-0.5 * squared_distances / rho**2) + sigma * jnp.eye(len(y))
    sample("y", dist.MultivariateNormal(jnp.zeros(len(y)), K), obs=y)


def mixture(y: Array) -> None:
    mu = sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(jnp.stack([theta, 1 - theta]))
    with numpyro.plate("rows", len(y)):
        sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


def runge_kutta(field: Callable[[Array, Array], Array], w: Array, grid: Array) -> Array:
    """The solution at the points of the grid, the first included."""

    def step(w: Array, interval: Array) -> tuple[Array, Array]:
        t, h = interval
        k1 = field(t, w)
        k2 = field(t + h / 2, w + h / 2 * k1)
        k3 = field(t + h / 2, w + h / 2 * k2)
        k4 = field(t + h, w + h * k3)
        w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return w, w

    _, solution = jax.lax.scan(step, w, (grid[:-1], jnp.diff(grid)))
    return jnp.concatenate([w[None], solution])


def hare_and_lynx(y: Array, grid: Array, stops: Array) -> None:
    loc, scale = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = sample("theta", dist.TruncatedNormal(loc, scale, low=0.0).to_event(1))
    z_init = sample("z_init", dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    alpha, beta, gamma, delta = theta

    def field(t: Array, w: Array) -> Array:
        return jnp.stack([alpha - beta * jnp.exp(w[1]), delta * jnp.exp(w[0]) - gamma])

    log_z = runge_kutta(field, jnp.log(z_init), grid)[stops]
    with numpyro.plate("years", len(y)):
        sample("y", dist.LogNormal(log_z, sigma).to_event(1), obs=y)


def elimination(
    times: Array, concentration: Array, dose: Array, volume: Array, grid: Array, stops: Array
) -> None:
    k_a, k_m, v_m = (sample(name, dist.HalfCauchy(1.0)) for name in ("k_a", "K_m", "V_m"))
    sigma = sample("sigma", dist.HalfCauchy(1.0))

    def field(t: Array, c: Array) -> Array:
        return dose / volume * k_a * jnp.exp(-k_a * t) - v_m / volume * c / (k_m + c)

    c = runge_kutta(field, jnp.zeros(()), grid)[stops]
    ok = (c > 0).all()  # not so for NaN
    numpyro.factor("solved", jnp.where(ok, 0.0, -jnp.inf))
    with numpyro.plate("times", len(times)):
        log_c = jnp.log(jnp.where(ok, c, 1.0))
        sample("concentration", dist.LogNormal(log_c, sigma), obs=concentration)


def motorcycle(
    x: Array, frequencies: Array, x_sigma: Array, frequencies_sigma: Array, y: Array
) -> None:
    def process(suffix: str, basis: Array, omega: Array, loc: float, scale: float) -> Array:
        intercept = sample(f"Intercept{suffix}", dist.StudentT(3.0, loc, scale))
        half_student = dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 36.0))
        amplitude = sample(f"sdgp{suffix}_1", half_student)
        length = sample(f"lscale{suffix}_1", dist.InverseGamma(1.124909, 0.0177))
        z = sample(f"zgp{suffix}_1", dist.Normal(0.0, 1.0).expand([len(omega)]).to_event(1))
        root = jnp.sqrt(math.sqrt(2 * math.pi) * length) * jnp.exp(-0.25 * (length * omega) ** 2)
        return intercept + basis @ (amplitude * root * z)

    mean = process("", x, frequencies, -13.0, 36.0)
    log_sd = process("_sigma", x_sigma, frequencies_sigma, 0.0, 10.0)
    with numpyro.plate("rows", len(y)):
        sample("y", dist.Normal(mean, jnp.exp(log_sd)), obs=y)


def german_credit(features: Array, label: Array) -> None:
    x = sample("x", dist.Normal(0.0, 1.0).expand([features.shape[-1]]).to_event(1))
    with numpyro.plate("rows", len(label)):
        sample("label", dist.Bernoulli(logits=features @ x), obs=label)


def radon(covariates: Array, county: Array, num_counties: Array, log_radon: Array) -> None:
    mean = sample("county_effect_mean", dist.Normal(0.0, 1.0))
    scale = sample("county_effect_scale", dist.Uniform(0.0, 100.0))
    with numpyro.plate("counties", int(num_counties)):
        effect = sample("county_effect", dist.Normal(mean, scale))
    weight = sample("weight", dist.Normal(0.0, 1.0).expand([covariates.shape[-1]]).to_event(1))
    noise = sample("log_radon_scale", dist.Uniform(0.0, 100.0))
    with numpyro.plate("rows", len(log_radon)):
        sample("log_radon", dist.Normal(covariates @ weight + effect[county], noise), obs=log_radon)


def brownian_motion(
    num_steps: Array, seen: Array, y: Array, innovation: Array, noise: Array
) -> None:
    size = int(num_steps)
    scale_tril = innovation * jnp.tril(jnp.ones((size, size)))
    x = sample("x", dist.MultivariateNormal(jnp.zeros(size), scale_tril=scale_tril))
    with numpyro.plate("observations", len(y)):
        sample("y", dist.Normal(x[seen], noise), obs=y)


def _flat_regression() -> Callable[..., None]:
    return partial(regression, beta_scale=None, sigma_prior=None)


def models() -> dict[str, Callable[..., None]]:
    """Name -> model. A function, because distributions are arrays of the dtype that is set by then."""
    return {
        "arK-arK": autoregression,
        "earnings-earn_height": _flat_regression(),
        "eight_schools-eight_schools_centered": schools_centered,
        "eight_schools-eight_schools_noncentered": schools_noncentered,
        "gp_pois_regr-gp_regr": gp_regression,
        "hudson_lynx_hare-lotka_volterra": hare_and_lynx,
        "kidiq-kidscore_momiq": partial(
            regression, beta_scale=None, sigma_prior=dist.HalfCauchy(2.5)
        ),
        "low_dim_gauss_mix-low_dim_gauss_mix": mixture,
        "mcycle_gp-accel_gp": motorcycle,
        "mesquite-mesquite": _flat_regression(),
        "nes1980-nes": _flat_regression(),
        "one_comp_mm_elim_abs-one_comp_mm_elim_abs": elimination,
        "sblrc-blr": partial(regression, beta_scale=10.0, sigma_prior=dist.HalfNormal(10.0)),
        "german_credit_numeric_logistic_regression": german_credit,
        "radon_contextual_effects_minnesota": radon,
        "brownian_motion_missing_middle_observations": brownian_motion,
    }
