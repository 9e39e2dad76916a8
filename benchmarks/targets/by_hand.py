"""Log-densities written out once more, in NumPy and as Stan's programs have them: over unconstrained space, up to a constant.

Draws alone cannot tell a right model where there are none; and two ways to write a density seldom share a mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .target import Samples, Target

Array = np.ndarray[Any, Any]


def _normal(x: Array, loc: Array | float, scale: Array | float) -> Array:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale)


def _gp_regression(target: Target, draw: dict[str, Array]) -> Array:
    squared_distances, y = (value.numpy() for value in target.args)
    rho, alpha, sigma = draw["rho"], draw["alpha"], draw["sigma"]
    cov = alpha**2 * np.exp(-squared_distances / (2 * rho**2)) + sigma * np.eye(len(y))
    log_lik = -0.5 * (y @ np.linalg.solve(cov, y) + np.linalg.slogdet(cov)[1])
    prior = 24 * np.log(rho) - 4 * rho + _normal(alpha, 0, 2) + _normal(sigma, 0, 1)
    return log_lik + prior + np.log(rho * alpha * sigma)


def _mixture(target: Target, draw: dict[str, Array]) -> Array:
    y = target.args[0].numpy()
    mu, sigma, theta = draw["mu"], draw["sigma"], draw["theta"]
    p = theta * np.exp(_normal(y, mu[0], sigma[0])) + (1 - theta) * np.exp(
        _normal(y, mu[1], sigma[1])
    )
    prior = _normal(sigma, 0, 2).sum() + _normal(mu, 0, 2).sum() + 4 * np.log(theta * (1 - theta))
    # exp for sigma and for the gap of mu, the logistic function for theta.
    jacobian = np.log(sigma).sum() + np.log(mu[1] - mu[0]) + np.log(theta * (1 - theta))
    return np.log(p).sum() + prior + jacobian


def _motorcycle(target: Target, draw: dict[str, Array]) -> Array:
    x, omega, x_sigma, omega_sigma, y = (value.numpy() for value in target.args)
    total = np.zeros(())

    def student(t: Array, loc: float, scale: float) -> Array:
        return -2 * np.log1p(((t - loc) / scale) ** 2 / 3)

    predictors = []
    for suffix, basis, frequencies, loc, scale in (
        ("", x, omega, -13.0, 36.0),
        ("_sigma", x_sigma, omega_sigma, 0.0, 10.0),
    ):
        intercept, sdgp = draw[f"Intercept{suffix}"], draw[f"sdgp{suffix}_1"]
        lscale, zgp = draw[f"lscale{suffix}_1"], draw[f"zgp{suffix}_1"]
        spectral = sdgp**2 * math.sqrt(2 * math.pi) * lscale
        spectral = spectral * np.exp(-0.5 * lscale**2 * frequencies**2)
        predictors.append(intercept + basis @ (np.sqrt(spectral) * zgp))
        total = total + student(intercept, loc, scale) + student(sdgp, 0.0, 36.0)
        total = total - 2.124909 * np.log(lscale) - 0.0177 / lscale - 0.5 * (zgp**2).sum()
        total = total + np.log(sdgp) + np.log(lscale)
    return total + _normal(y, predictors[0], np.exp(predictors[1])).sum()


def _brownian_motion(target: Target, draw: dict[str, Array]) -> Array:
    _, seen, y, innovation, noise = (torch.as_tensor(value).numpy() for value in target.args)
    x = draw["x"]
    steps = np.diff(np.concatenate([[0.0], x]))
    return -0.5 * (steps**2).sum() / innovation**2 - 0.5 * ((y - x[seen]) ** 2).sum() / noise**2


BY_HAND: dict[str, Callable[[Target, dict[str, Array]], Array]] = {
    "gp_pois_regr-gp_regr": _gp_regression,
    "low_dim_gauss_mix-low_dim_gauss_mix": _mixture,
    "mcycle_gp-accel_gp": _motorcycle,
    "brownian_motion_missing_middle_observations": _brownian_motion,
}


def largest_difference(target: Target, samples: Samples) -> float | None:
    """max_n |(a_n - a_1) - (b_n - b_1)| / max(1, |a_n|), a by the model and b by hand; None where there is no b.

    Point 1 is the one of largest density: far out |a| is so large that its rounding errors show.
    """
    if target.name not in BY_HAND:
        return None
    by_hand = BY_HAND[target.name]
    arrays = {name: value.numpy() for name, value in samples.items()}
    a = target.log_density(target.unconstrain(samples)).numpy()
    b = np.array([by_hand(target, {k: v[i] for k, v in arrays.items()}) for i in range(len(a))])
    error = np.abs((a - a.max()) - (b - b[a.argmax()]))
    return float((error / np.maximum(1, np.abs(a))).max())
