"""Larger posteriors of TensorFlow Probability's Inference Gym (Sountsov, Radul & contributors, 2020).

Means and standard deviations are the Gym's own, from long runs of Stan; the draws are of a NUTS run by others, which
agrees with them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .pieces import f64, fill_plate, linear
from .target import Reference, Target, data_root, flatten, read_npz

Data = dict[str, Tensor]


def german_credit(features: Tensor, label: Tensor) -> None:
    """label_n ~ Bernoulli(σ(features_n x)), x ~ N(0, 1), the last feature constant."""
    x = pyro.sample("x", dist.Normal(f64(0.0), f64(1.0)).expand([features.shape[-1]]).to_event(1))
    with pyro.plate("rows", len(label)):
        pyro.sample("label", dist.Bernoulli(logits=linear(features, x)), obs=label)


def radon(covariates: Tensor, county: Tensor, num_counties: int, log_radon: Tensor) -> None:
    """log_radon_n ~ N(covariates_n weight + county_effect[county_n], log_radon_scale)."""
    mean = pyro.sample("county_effect_mean", dist.Normal(f64(0.0), f64(1.0)))
    scale = pyro.sample("county_effect_scale", dist.Uniform(f64(0.0), f64(100.0)))
    with pyro.plate("counties", num_counties):
        effect = pyro.sample("county_effect", dist.Normal(mean, scale))
    prior = dist.Normal(f64(0.0), f64(1.0)).expand([covariates.shape[-1]]).to_event(1)
    weight = pyro.sample("weight", prior)
    noise = pyro.sample("log_radon_scale", dist.Uniform(f64(0.0), f64(100.0)))
    with pyro.plate("rows", len(log_radon)):
        loc = linear(covariates, weight) + effect.index_select(-1, county)
        pyro.sample("log_radon", dist.Normal(loc, noise), obs=log_radon)


def brownian_motion(
    num_steps: int, seen: Tensor, y: Tensor, innovation: Tensor, noise: Tensor
) -> None:
    """x_t ~ N(x_{t-1}, innovation) from x_{-1} = 0, y ~ N(x[seen], noise)."""
    # The Cholesky factor of a random walk's covariance is all ones, times the step.
    scale_tril = innovation * torch.ones(num_steps, num_steps, dtype=y.dtype).tril()
    prior = dist.MultivariateNormal(torch.zeros(num_steps, dtype=y.dtype), scale_tril=scale_tril)
    x = pyro.sample("x", prior)
    with pyro.plate("observations", len(y)):
        pyro.sample("y", dist.Normal(fill_plate(x.index_select(-1, seen)), noise), obs=y)


def _german_credit(data: Data) -> tuple[Any, ...]:
    features = data["features"]
    ones = torch.ones(len(features), 1, dtype=features.dtype)
    return torch.cat([features, ones], -1), data["label"].double()


def _radon(data: Data) -> tuple[Any, ...]:
    names = ("log_uranium", "floor", "floor_by_county")
    county = data["county"].long()
    covariates = torch.stack([data[name].double() for name in names], -1)
    return covariates, county, int(county.max()) + 1, data["log_radon"]


def _brownian_motion(data: Data) -> tuple[Any, ...]:
    y = data["observed_loc"]
    seen = y.isfinite().nonzero().squeeze(-1)
    return len(y), seen, y[seen], data["innovation_noise"], data["observation_noise"]


def _read(
    name: str, model: Callable[..., Any], arguments: Callable[[Data], tuple[Any, ...]]
) -> Target:
    folder = data_root() / "inference_gym" / name
    truth = read_npz(folder / "ground_truth.npz")
    draws = read_npz(folder / "nuts_draws.npz")

    def scalars(kind: str) -> dict[str, float]:
        values = flatten({key: truth[f"{key}__{kind}"].unsqueeze(0) for key in draws})
        return {key: value.item() for key, value in values.items()}

    reference = Reference(
        mean=scalars("mean"),
        sd=scalars("sd"),
        parameters=draws,
        origin="Inference Gym: long runs of Stan; the draws are 2500 of NumPyro's NUTS",
    )
    dim = len(reference.mean)
    return Target(name, model, arguments(read_npz(folder / "data.npz")), dim, reference)


_MODELS: dict[str, tuple[Callable[..., Any], Callable[[Data], tuple[Any, ...]]]] = {
    "german_credit_numeric_logistic_regression": (german_credit, _german_credit),
    "radon_contextual_effects_minnesota": (radon, _radon),
    "brownian_motion_missing_middle_observations": (brownian_motion, _brownian_motion),
}

TARGETS: dict[str, Callable[[], Target]] = {
    name: partial(_read, name, model, arguments) for name, (model, arguments) in _MODELS.items()
}
