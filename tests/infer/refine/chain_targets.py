"""Densities with known moments, and how far a sample's moments are from them in standard errors."""

import math

import torch

from pyro_flows_ext.ops import bulk_ess


def correlated(dim, rho, dtype=torch.float64):
    """log N(1, Σ) with unit variances and correlation rho, unnormalised, and the lower Cholesky factor of Σ."""
    covariance = torch.full((dim, dim), rho, dtype=dtype) + (1 - rho) * torch.eye(dim, dtype=dtype)
    precision = covariance.inverse()

    def log_density(u):
        return -((u - 1) @ precision * (u - 1)).sum(-1) / 2

    return log_density, torch.linalg.cholesky(covariance)


def gamma(shape):
    """log density of log x, x ~ Gamma(shape, 1), in each of D coordinates: E x = Var x = shape."""

    def log_density(u):
        return (shape * u - u.exp()).sum(-1)

    return log_density


def truncated(u):
    """A standard normal on u > 0 in each coordinate: E u = sqrt(2 / π)."""
    return torch.where((u > 0).all(-1), -u.square().sum(-1) / 2, -torch.inf)


def truncated_mean():
    """E u under `truncated`."""
    return math.sqrt(2 / math.pi)


def z_score(draws, mean):
    """The error of the mean of draws by chain `(C, S)`, in its Monte Carlo standard errors."""
    se = draws.std() / bulk_ess(draws).sqrt()
    return abs(float((draws.mean() - mean) / se))
