"""Models with data of their own, and their posteriors where these are known: for the command, benchmarks and tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..datasets import scikit_learn_datasets
from ..distributions.energies import u1

Data = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A model with data of its own. `data()` gives the keyword arguments of `model`.

    `reference`: the posterior (mean, sd) of scalars by name, vectors as `theta[0]`, where they are known.
    """

    name: str
    model: Callable[..., Any]
    data: Callable[[], Data]
    description: str
    reference: Mapping[str, tuple[float, float]] | None = None


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, non-centred: y_j ~ N(mu + tau theta_trans_j, sigma_j)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, centred: theta_j ~ N(mu, tau), y_j ~ N(theta_j, sigma_j); a funnel in (theta, log tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def logistic_regression(x: Tensor, y: Tensor) -> None:
    """y_n ~ Bernoulli(σ(intercept + x_nᵀ weights)), N(0, 5) and N(0, 1) priors."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + (x * weights).sum(-1)), obs=y)


def linear_regression(x: Tensor, y: Tensor) -> None:
    """y_n ~ N(intercept + x_nᵀ weights, noise), N(0, 1) priors and a half-normal one for the noise."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + (x * weights).sum(-1), noise), obs=y)


def energy_u1() -> None:
    """log p(z) = -U1(z): a ring with two lobes, log Z = 1.8775."""
    # Masked: something to draw a start from that adds nothing to the log joint.
    z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([2]).to_event(1).mask(False))
    pyro.factor("minus_u1", -u1(z))


def funnel() -> None:
    """v ~ N(0, 3), x_i ~ N(0, exp(v / 2)), i = 1 ... 9; log Z = 0."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("I", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


# --- data ---


def _schools_data() -> Data:
    return {
        "y": torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
        "sigma": torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
    }


def _sklearn_data(name: str, standardize_y: bool) -> Data:
    """A data set of scikit-learn with standardised columns; nothing is downloaded."""
    x, y = getattr(scikit_learn_datasets(), f"load_{name}")(return_X_y=True)
    tensors = {
        key: torch.as_tensor(value, dtype=torch.get_default_dtype())
        for key, value in {"x": x, "y": y}.items()
    }
    for key in ("x", "y") if standardize_y else ("x",):
        value = tensors[key]
        tensors[key] = (value - value.mean(0)) / value.std(0, correction=0)
    return tensors


# Mean and sd of 10,000 draws of Stan's NUTS, from posteriordb (BSD-3): eight_schools-eight_schools_noncentered.
_SCHOOLS_REFERENCE = {
    "mu": (4.411, 3.309),
    "tau": (3.602, 3.198),
    "theta[0]": (6.151, 5.616),
    "theta[1]": (4.940, 4.646),
    "theta[2]": (3.906, 5.281),
    "theta[3]": (4.796, 4.771),
    "theta[4]": (3.614, 4.615),
    "theta[5]": (4.051, 4.796),
    "theta[6]": (6.317, 5.003),
    "theta[7]": (4.884, 5.318),
}

TARGETS = {
    target.name: target
    for target in (
        Target(
            "eight-schools",
            eight_schools,
            _schools_data,
            "eight schools, non-centred; 10 latents, mild skew",
            _SCHOOLS_REFERENCE,
        ),
        Target(
            "eight-schools-centered",
            eight_schools_centered,
            _schools_data,
            "eight schools, centred; 10 latents, a funnel",
            _SCHOOLS_REFERENCE,
        ),
        Target(
            "logistic-regression",
            logistic_regression,
            lambda: _sklearn_data("breast_cancer", standardize_y=False),
            "breast cancer, 569 rows; 31 latents, strongly correlated (needs scikit-learn)",
        ),
        Target(
            "linear-regression",
            linear_regression,
            lambda: _sklearn_data("diabetes", standardize_y=True),
            "diabetes, 442 rows; 12 latents, correlated (needs scikit-learn)",
        ),
        Target(
            "u1",
            energy_u1,
            dict,
            "the energy U1 of Rezende & Mohamed (2015); 2 latents, a ring with two lobes, log Z = 1.8775",
        ),
        Target(
            "funnel",
            funnel,
            dict,
            "Neal's funnel (2003); 10 latents, log Z = 0",
            # x_i has variance E[exp(v)] = exp(9 / 2).
            {"v": (0.0, 3.0), **{f"x[{i}]": (0.0, 9.488) for i in range(9)}},
        ),
    )
}
