"""Models of every style compile, and train as they do under `pyro.infer.SVI`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_flows_ext.guides import AutoAmortizedFlow, AutoIAF, AutoPlanar
from pyro_flows_ext.infer import AnnealedELBO, ImportanceWeightedELBO, linear
from pyro_flows_ext.infer.compiled import CompiledSVI

STEPS = 5

X = torch.linspace(-1, 1, 24).reshape(8, 3).sin()
Y = torch.tensor([0.3, -0.2, 0.8, 1.4, -0.5, 0.1, 0.9, -1.1])


class Case(NamedTuple):
    make: Callable[[], tuple[Any, Any]]  # a model and a guide
    args: tuple[Any, ...] = ()
    loss: Callable[[], Any] = Trace_ELBO


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, 1.0), obs=Y)


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=(y > 0).to(y.dtype))


def subsampled() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 8, subsample_size=3) as rows:
        pyro.sample("y", dist.Normal(X[rows] @ w, 0.5), obs=Y[rows])


def local_latents() -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", 8, subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 0.5), obs=Y[rows])


def local_guide() -> None:
    loc = pyro.param("loc", torch.zeros(8))
    with pyro.plate("data", 8, subsample_size=4) as rows:
        pyro.sample("z", dist.Normal(loc[rows], 0.3))


def observed_outside() -> None:
    """A site outside of the plate, which does not depend on its latents, and one that does, by their sum."""
    mean = pyro.param("mean", torch.tensor(0.3))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor([0.3, -0.2, 0.8, 1.4]))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.2))


def summed_outside() -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.2))


def in_the_plate() -> None:
    loc = pyro.param("loc", torch.zeros(4))
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(loc, 1.0))


def constrained() -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    v = pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    pyro.sample("obs", dist.Normal(weights.sum() + v.sum(), rate), obs=torch.tensor(0.4))


def constrained_guide() -> None:
    simplex = pyro.param("simplex", torch.full((3,), 1 / 3), constraint=constraints.simplex)
    tril = pyro.param("tril", 0.3 * torch.eye(2), constraint=constraints.lower_cholesky)
    bounded = pyro.param("bounded", torch.tensor(1.5), constraint=constraints.interval(1, 2))
    pyro.param("unused", torch.tensor(0.0))
    pyro.sample("weights", dist.Dirichlet(5 * simplex))
    pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
    pyro.sample("rate", dist.LogNormal(0.0, bounded - 0.9))


def gaussian_mixture() -> None:
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 0.5))
    with pyro.plate("data", 8):
        pyro.sample("y", mixture, obs=Y)


def time_loop() -> None:
    drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    state = torch.tensor(0.0)
    for t in pyro.markov(range(5)):
        state = pyro.sample(f"state_{t}", dist.Normal(state + drift, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(state, 0.3), obs=Y[t])


def scaled_and_masked() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=torch.tensor(0.3)), poutine.mask(mask=Y > 0), pyro.plate("data", 8):
        pyro.sample("y", dist.Normal(z, 0.5), obs=Y)
    pyro.factor("tilt", -z.abs())


def gaussian_process() -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    x = X[:, 0]
    K = torch.exp(-0.5 * ((x[:, None] - x) / length) ** 2) + 0.1 * torch.eye(8)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(8), K), obs=Y)


def discrete() -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(2 * z - 1, 1.0), obs=torch.tensor(0.4))


def discrete_guide() -> None:
    p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
    pyro.sample("z", dist.Bernoulli(p))


def with_modules() -> tuple[Any, Any]:
    """A VAE with dropout and batch normalisation, whose networks model and guide close over."""
    encoder = nn.Sequential(
        nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    )
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


class Linear(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.noise = pyro.nn.PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=y)


def bayesian_module() -> tuple[Any, Any]:
    model = Linear()
    return model, AutoNormal(model)


def amortized(flow: str | None) -> Callable[[], tuple[Any, Any]]:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    return lambda: (model, AutoAmortizedFlow(model, nn.Linear(3, 4).double(), flow=flow))


def guided(model: Any, guide: Any, **options: Any) -> Callable[[], tuple[Any, Any]]:
    return lambda: (model, guide(model, **options))


def pair(model: Any, guide: Any) -> Callable[[], tuple[Any, Any]]:
    return lambda: (model, guide)


def weighted(num: int, gradient: str, **options: Any) -> Callable[[], Any]:
    return lambda: ImportanceWeightedELBO(num, gradient, max_plate_nesting=1, **options)


def vectorized() -> Any:
    return Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)


COMPILES = {
    "AutoNormal": Case(guided(schools, AutoNormal)),
    "AutoDelta": Case(guided(schools, AutoDelta)),
    "AutoDiagonalNormal": Case(guided(schools, AutoDiagonalNormal)),
    "AutoMultivariateNormal": Case(guided(schools, AutoMultivariateNormal)),
    "AutoLowRank": Case(guided(schools, AutoLowRankMultivariateNormal)),
    "AutoIAFNormal": Case(guided(schools, AutoIAFNormal, num_transforms=2)),
    "AutoIAF": Case(guided(schools, AutoIAF)),
    "AutoPlanar": Case(guided(schools, AutoPlanar, num_layers=3)),
    "arguments": Case(guided(regression, AutoMultivariateNormal), (X, Y)),
    "subsample": Case(guided(subsampled, AutoNormal)),
    "local": Case(pair(local_latents, local_guide)),
    "constraints": Case(pair(constrained, constrained_guide)),
    "mixture": Case(guided(gaussian_mixture, AutoNormal)),
    "time-loop": Case(guided(time_loop, AutoNormal)),
    "scale-mask-factor": Case(guided(scaled_and_masked, AutoNormal)),
    "gaussian-process": Case(guided(gaussian_process, AutoNormal)),
    "score-function": Case(pair(discrete, discrete_guide)),
    "modules": Case(with_modules, (X,)),
    "PyroModule": Case(bayesian_module, (X, Y)),
    "amortized-planar": Case(amortized("planar"), (X.double(),)),
    "amortized-gaussian": Case(amortized(None), (X.double(),)),
    "amortized-cif": Case(amortized("cif"), (X.double(),)),
    "particles": Case(guided(schools, AutoNormal), loss=vectorized),
    "particles-loop": Case(
        pair(constrained, constrained_guide), loss=lambda: Trace_ELBO(num_particles=2)
    ),
    "mean-field": Case(guided(schools, AutoNormal), loss=TraceMeanField_ELBO),
    "iwae": Case(guided(schools, AutoNormal), loss=weighted(4, "iwae")),
    "dreg": Case(guided(schools, AutoNormal), loss=weighted(4, "dreg")),
    "stl": Case(guided(schools, AutoNormal), loss=weighted(1, "stl")),
    "stl-bounds": Case(guided(schools, AutoNormal), loss=weighted(1, "stl", num_bounds=3)),
    "stl-flow": Case(guided(schools, AutoIAF), loss=weighted(1, "stl")),
    "iwae-local": Case(pair(local_latents, local_guide), loss=weighted(3, "iwae")),
    "annealed": Case(
        guided(schools, AutoNormal), loss=lambda: AnnealedELBO(Trace_ELBO(), linear(9))
    ),
    "annealed-kl": Case(
        guided(schools, AutoNormal),
        loss=lambda: AnnealedELBO(TraceMeanField_ELBO(), linear(9), term="kl"),
    ),
    "iwae-outside": Case(pair(observed_outside, in_the_plate), loss=weighted(4, "dreg")),
    "iwae-outside-vectorized": Case(
        pair(observed_outside, in_the_plate), loss=weighted(4, "iwae", vectorize_particles=True)
    ),
    "iwae-sum": Case(
        pair(summed_outside, in_the_plate), loss=weighted(4, "dreg", vectorize_particles=True)
    ),
    "annealed-iwae": Case(
        guided(schools, AutoNormal),
        loss=lambda: AnnealedELBO(weighted(3, "iwae")(), linear(9), term="likelihood"),
    ),
}


def train(case: Case, compiled: bool, **options: Any) -> tuple[list[float], dict[str, Any], Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = case.make()
    optim = pyro.optim.Adam({"lr": 0.02})
    if compiled:
        svi: Any = CompiledSVI(model, guide, optim, case.loss(), backend="eager", **options)
    else:
        svi = SVI(model, guide, optim, case.loss())
    losses = [svi.step(*case.args) for _ in range(STEPS)]
    return losses, {k: v.detach().clone() for k, v in pyro.get_param_store().items()}, svi


def agree(
    a: tuple[list[float], dict[str, Any], Any], b: tuple[list[float], dict[str, Any], Any]
) -> None:
    torch.testing.assert_close(torch.tensor(a[0]), torch.tensor(b[0]), rtol=1e-4, atol=1e-4)
    assert a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        torch.testing.assert_close(
            value, b[1][name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILES)
def test_trains_as_the_handlers_do(name: str) -> None:
    case = COMPILES[name]
    ours = train(case, compiled=True)
    assert ours[2].fallback_reason is None
    agree(ours, train(case, compiled=False))
