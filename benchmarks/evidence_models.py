"""Small models with an evidence known by conjugacy or quadrature, for `benchmarks/evidence.py`.

Each function of `CASES` returns the model without arguments and its log evidence in nats. The exact values come from
SciPy's distributions and quadrature and share no code with the models. Data are fixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from scipy import integrate, special, stats

Case = tuple[Callable[[], None], float]
Y = np.array([0.8, -0.3, 1.9, 1.2, 0.4, 2.3, 1.1, -0.6])
X = np.random.default_rng(0).standard_normal((8, 5))
GROUP = np.array([0, 0, 1, 1, 1, 2, 2, 3])
COUNTS = np.array([3, 1, 4, 2, 6, 2, 3, 5])
ONES, EYE = np.ones((8, 8)), np.eye(8)


def tensor(x: object) -> torch.Tensor:
    return torch.as_tensor(x).to(torch.get_default_dtype())


def gaussian(y: np.ndarray, cov: np.ndarray) -> float:
    """Log density of y under N(0, cov)."""
    return float(stats.multivariate_normal(np.zeros(len(y)), cov).logpdf(y))


def quadrature(log_joint: Callable[[float], float], low: float, high: float) -> float:
    """log ∫ exp log_joint(z) dz over [low, high], in 40 pieces of adaptive quadrature."""
    edges = np.linspace(low, high, 41)
    top = max(log_joint(z) for z in (edges[1:] + edges[:-1]) / 2)
    pieces = [
        integrate.quad(lambda z: np.exp(log_joint(z) - top), a, b)[0]
        for a, b in itertools.pairwise(edges)
    ]
    return float(top + np.log(sum(pieces)))


def observe(distribution: dist.TorchDistribution, y: np.ndarray = Y) -> None:
    """Observes y in a plate."""
    with pyro.plate("data", len(y)):
        pyro.sample("y", distribution, obs=tensor(y))


def normal_normal() -> Case:
    def model() -> None:
        observe(dist.Normal(pyro.sample("mu", dist.Normal(0.0, 5.0)), 1.0))

    return model, gaussian(Y, EYE + 25 * ONES)


def normal_inverse_gamma() -> Case:
    def model() -> None:
        v = pyro.sample("v", dist.InverseGamma(3.0, 2.0))
        observe(dist.Normal(pyro.sample("mu", dist.Normal(0.0, (2 * v).sqrt())), v.sqrt()))

    return model, float(stats.multivariate_t(np.zeros(8), 2 / 3 * (EYE + 2 * ONES), 6).logpdf(Y))


def beta_binomial() -> Case:
    def model() -> None:
        observe(dist.Binomial(10, pyro.sample("p", dist.Beta(2.0, 3.0))), COUNTS)

    n, s = 80, COUNTS.sum()
    choices = np.log(special.comb(10, COUNTS)).sum()
    return model, float(choices + special.betaln(2 + s, 3 + n - s) - special.betaln(2, 3))


def gamma_poisson() -> Case:
    def model() -> None:
        observe(dist.Poisson(pyro.sample("rate", dist.Gamma(2.0, 0.5))), COUNTS)

    a, s = 2.0, COUNTS.sum()
    exact = a * np.log(0.5) + special.gammaln(a + s) - special.gammaln(a)
    return model, float(exact - (a + s) * np.log(8.5) - special.gammaln(COUNTS + 1).sum())


def dirichlet_multinomial() -> Case:
    prior, counts = np.array([1.0, 2.0, 3.0, 0.5]), np.array([7, 3, 9, 1])

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(tensor(prior)))
        pyro.sample("y", dist.Multinomial(20, p), obs=tensor(counts))

    return model, float(stats.dirichlet_multinomial(prior, 20).logpmf(counts))


def regression(num: int) -> Case:
    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([num]).to_event(1))
        observe(dist.Normal(tensor(X[:, :num]) @ w, 0.7))

    return model, gaussian(Y, 0.49 * EYE + 4 * X[:, :num] @ X[:, :num].T)


def logistic() -> Case:
    x, y = X[:, 0], (Y > 1).astype(float)

    def model() -> None:
        w = pyro.sample("w", dist.Normal(0.0, 3.0))
        observe(dist.Bernoulli(logits=w * tensor(x)), y)

    def log_joint(w: float) -> float:
        return float(stats.norm.logpdf(w, 0, 3) + (y * w * x - np.logaddexp(0, w * x)).sum())

    return model, quadrature(log_joint, -30, 30)


def student_location() -> Case:
    def model() -> None:
        observe(dist.StudentT(3.0, pyro.sample("mu", dist.Normal(0.0, 5.0)), 0.5))

    return model, quadrature(
        lambda m: stats.norm.logpdf(m, 0, 5) + stats.t.logpdf(Y, 3, m, 0.5).sum(), -50, 50
    )


def uniform_below_latent() -> Case:
    def model() -> None:
        a = pyro.sample("a", dist.Gamma(3.0, 1.0))
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Uniform(0.0, a)), 0.5), obs=tensor(1.7))

    def log_joint(a: float) -> float:
        inside = stats.norm.cdf((a - 1.7) / 0.5) - stats.norm.cdf(-1.7 / 0.5)
        return float(stats.gamma.logpdf(a, 3) + np.log(inside / a))

    return model, quadrature(log_joint, 0, 60)


def uniform_likelihood() -> Case:
    y = np.abs(Y)

    def model() -> None:
        a = pyro.sample("a", dist.Pareto(1.0, 2.0))
        observe(dist.Uniform(0.0, a, validate_args=False), y)

    return model, float(np.log(2) - np.log(10) - 10 * np.log(y.max()))


def half_cauchy() -> Case:
    def model() -> None:
        observe(dist.Normal(0.0, pyro.sample("scale", dist.HalfCauchy(1.0))))

    return model, quadrature(
        lambda t: stats.halfcauchy.logpdf(np.exp(t)) + stats.norm.logpdf(Y, 0, np.exp(t)).sum() + t,
        -8,
        12,
    )


def lognormal() -> Case:
    y = np.array([0.5, 2.0, 3.5])

    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            x = pyro.sample("x", dist.LogNormal(m, 0.8))
            pyro.sample("y", dist.LogNormal(x.log(), 0.5), obs=tensor(y))

    return model, gaussian(np.log(y), np.ones((3, 3)) + 0.89 * np.eye(3)) - np.log(y).sum()


def mixture() -> Case:
    @config_enumerate
    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 8):
            z = pyro.sample("z", dist.Bernoulli(0.6))
            pyro.sample("y", dist.Normal(z * loc, 0.5), obs=tensor(Y))

    def log_joint(m: float) -> float:
        density = 0.4 * stats.norm.pdf(Y, 0, 0.5) + 0.6 * stats.norm.pdf(Y, m, 0.5)
        return float(stats.norm.logpdf(m, 0, 3) + np.log(density).sum())

    return model, quadrature(log_joint, -30, 30)


def hidden_markov() -> Case:
    stay = np.array([[0.8, 0.2], [0.3, 0.7]])

    @config_enumerate
    def model() -> None:
        loc, z, transition = pyro.sample("loc", dist.Normal(0.0, 3.0)), 0, tensor(stay)
        for t in pyro.markov(range(8)):
            z = pyro.sample(f"z{t}", dist.Categorical(transition[z]))
            pyro.sample(f"y{t}", dist.Normal(z * loc, 0.5), obs=tensor(Y[t]))

    def log_joint(m: float) -> float:
        forward, log_likelihood = stay[0], 0.0
        for y in Y:
            forward = forward * stats.norm.pdf(y, [0, m], 0.5)
            log_likelihood += np.log(forward.sum())
            forward = forward / forward.sum() @ stay
        return float(stats.norm.logpdf(m, 0, 3) + log_likelihood)

    return model, quadrature(log_joint, -30, 30)


def masked() -> Case:
    seen = np.array([True, True, False, True, False, True, True, True])

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=tensor(Y), obs_mask=torch.tensor(seen))

    return model, gaussian(Y[seen], (EYE + 4 * ONES)[:6, :6])


def padded() -> Case:
    lengths = [3, 1, 4]
    inside = np.arange(4) < np.array(lengths)[:, None]
    y = np.where(inside, np.resize(Y, (3, 4)), 0.0)

    def model() -> None:
        with pyro.plate("sequences", 3, dim=-2):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("time", 4, dim=-1), poutine.mask(mask=torch.tensor(inside)):
                x = pyro.sample("x", dist.Normal(h, 0.7))
                pyro.sample("y", dist.Normal(x, 0.5), obs=tensor(y))

    return model, sum(
        gaussian(y[i, :n], np.ones((n, n)) + 0.74 * np.eye(n)) for i, n in enumerate(lengths)
    )


def hierarchical() -> Case:
    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 4, dim=-1):
            theta = pyro.sample("theta", dist.Normal(mu, 0.8))
            with pyro.plate("replicates", 2, dim=-2):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=tensor(Y.reshape(2, 4)))

    return model, gaussian(Y, EYE + 4 * ONES + 0.64 * np.kron(np.ones((2, 2)), np.eye(4)))


def indexed() -> Case:
    def model() -> None:
        with pyro.plate("groups", 4):
            alpha = pyro.sample("alpha", dist.Normal(1.0, 1.5))
        observe(dist.Normal(alpha[torch.tensor(GROUP)], 1.0))

    return model, gaussian(Y - 1, EYE + 2.25 * (GROUP[:, None] == GROUP))


def gaussian_process() -> Case:
    time = np.linspace(0, 3, 8)
    kernel = np.exp(-((time[:, None] - time) ** 2) / 2) + 1e-4 * EYE

    def model() -> None:
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(8), tensor(kernel)))
        observe(dist.Normal(f, 0.5))

    return model, gaussian(Y, kernel + 0.25 * EYE)


def truncated() -> Case:
    def model() -> None:
        observe(dist.Normal(pyro.sample("mu", dist.Uniform(-1.0, 0.5)), 1.0))

    return model, quadrature(lambda m: -np.log(1.5) + stats.norm.logpdf(Y, m, 1).sum(), -1.0, 0.5)


def raising() -> Case:
    pairs = np.stack([Y, Y + X[:, 0]], -1)

    def model() -> None:
        rho = pyro.sample("rho", dist.Normal(0.0, 1.0))
        one = torch.ones_like(rho)
        covariance = torch.stack([one, rho, rho, one], -1).unflatten(-1, (2, 2))
        factor = torch.linalg.cholesky(covariance)
        observe(dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), pairs)

    def log_joint(rho: float) -> float:
        cov = [[1, rho], [rho, 1]]
        return float(
            stats.norm.logpdf(rho) + stats.multivariate_normal([0, 0], cov).logpdf(pairs).sum()
        )

    return model, quadrature(log_joint, -0.9999, 0.9999)


CASES: dict[str, Callable[[], Case]] = {
    "normal-normal": normal_normal,
    "normal-inverse-gamma": normal_inverse_gamma,
    "beta-binomial": beta_binomial,
    "gamma-Poisson": gamma_poisson,
    "Dirichlet-multinomial": dirichlet_multinomial,
    "regression, 2": lambda: regression(2),
    "regression, 5": lambda: regression(5),
    "logistic": logistic,
    "Student-t location": student_location,
    "x ~ Uniform(0, a)": uniform_below_latent,
    "y ~ Uniform(0, a)": uniform_likelihood,
    "half-Cauchy scale": half_cauchy,
    "log-normal latents": lognormal,
    "mixture, enumerated": mixture,
    "HMM, enumerated": hidden_markov,
    "obs_mask": masked,
    "padded sequences": padded,
    "hierarchical normal": hierarchical,
    "alpha[group]": indexed,
    "Gaussian process": gaussian_process,
    "truncated prior": truncated,
    "raises for some draws": raising,
}

# Where the prior median has density zero, a guide starts here.
STARTS = {"y ~ Uniform(0, a)": {"a": 3.0}}
# Latents that are summed out, and that guides leave out.
ENUMERATED = {"mixture, enumerated": ["z"], "HMM, enumerated": [f"z{t}" for t in range(8)]}
