"""Annealed importance sampling against evidences in closed form and by quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_flows_ext.diagnostics.ais import annealed_importance_sampling, log_evidence_ais
from pyro_flows_ext.guides import AutoPlanar

W = torch.tensor([[1.0, 0.8], [0.0, 1.0], [1.0, -0.5]], dtype=torch.float64)
SD = 0.4
COVARIANCE = W @ W.T + SD**2 * torch.eye(3, dtype=torch.float64)
X = 2 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def log_evidence(x):
    """z ~ N(0, I), x ~ N(W z, .4² I): x ~ N(0, W Wᵀ + .4² I)."""
    return dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), COVARIANCE).log_prob(x)


def prior_of(x):
    return dist.Normal(x.new_zeros(*x.shape[:-1], 2), 1.0).to_event(1)


def target_of(x):
    prior = prior_of(x)
    return lambda u: prior.log_prob(u) + dist.Normal(u @ W.T, SD).to_event(1).log_prob(x)


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", prior_of(x[0]))
        pyro.sample("x", dist.Normal(z @ W.T, SD).to_event(1), obs=x)


# --- the estimate ---


def test_linear_gaussian_by_datum():
    result = annealed_importance_sampling(
        target_of(X), prior_of(X), num_chains=64, num_steps=150, num_leapfrog=5
    )
    error = result.log_evidence - log_evidence(X)
    assert (error.abs() < 4 * result.log_evidence_se).all()
    assert (result.log_evidence_se < 0.2).all()
    assert (result.ess > 20).all()
    assert ((result.acceptance - 0.65).abs() < 0.1).all()
    assert result.log_weights.shape == (64, 5)
    assert result.samples.shape == (64, 5, 2)
    # The ends of the chains are draws of the posterior N(m, S).
    S = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + W.T @ W / SD**2)
    m = X @ W @ S / SD**2
    z_scores = (result.samples.mean(0) - m) / (S.diagonal() / 64).sqrt()
    assert z_scores.abs().max() < 4.5


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 15])
def test_weights_are_unbiased_and_their_logarithm_falls_short(num_steps):
    """However few the steps, and although their sizes are adapted: E ŵ = p(x), hence E log ŵ <= log p(x)."""
    x = X[:1] / 3
    copies = x.expand(4000, 3)
    result = annealed_importance_sampling(
        target_of(copies), prior_of(copies), num_chains=8, num_steps=num_steps, num_leapfrog=3
    )
    ratio = (result.log_evidence - log_evidence(x)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 4000**0.5
    short = result.log_evidence - log_evidence(x)
    assert short.mean() < -4 * short.std() / 4000**0.5


def test_standard_error_is_the_spread_of_estimates():
    x = (X[:1] / 3).expand(300, 3)
    result = annealed_importance_sampling(
        target_of(x), prior_of(x), num_chains=32, num_steps=40, num_leapfrog=3
    )
    spread = result.log_evidence.std()
    assert result.log_evidence_se.median().item() == pytest.approx(spread.item(), rel=0.25)


def two_modes(u):
    """log of N(u; 0, 2) (.4 N(1; u, .1) + .6 N(-2; u², .5)), u `(*, 1)`: modes of different shapes at 1 and near 0."""
    u = u[..., 0]
    parts = torch.stack(
        [
            math.log(0.4) + dist.Normal(u, 0.1).log_prob(u.new_tensor(1.5)),
            math.log(0.6) + dist.Normal(u.abs().sqrt(), 0.5).log_prob(u.new_tensor(1.5)),
        ]
    )
    return dist.Normal(0.0, 2.0).log_prob(u) + parts.logsumexp(0)


def test_two_modes_by_quadrature():
    u = torch.linspace(-20.0, 20.0, 400_001, dtype=torch.float64)
    density = two_modes(u.unsqueeze(-1)).exp()
    evidence = torch.trapezoid(density, u)
    left = torch.trapezoid(density * (u < 0), u) / evidence
    start = dist.Normal(torch.zeros(1, dtype=torch.float64), 2.0).to_event(1)
    result = annealed_importance_sampling(
        two_modes, start, num_chains=1000, num_steps=80, num_leapfrog=5
    )
    assert result.log_evidence.item() == pytest.approx(
        evidence.log().item(), abs=4 * result.log_evidence_se.item()
    )
    assert result.log_evidence_se < 0.05
    weights = result.log_weights.softmax(0)
    share = (weights * (result.samples[:, 0] < 0)).sum()
    assert share.item() == pytest.approx(left.item(), abs=4 * 0.5 / result.ess.item() ** 0.5)


def test_steps_follow_the_scales_of_the_start():
    scale = torch.logspace(-3, 3, 7, dtype=torch.float64)
    start = dist.Normal(torch.zeros(7, dtype=torch.float64), scale).to_event(1)
    posterior = dist.Normal(0.3 * scale, 0.5 * scale).to_event(1)
    result = annealed_importance_sampling(
        lambda u: posterior.log_prob(u) + 1.0, start, num_chains=64, num_steps=60, num_leapfrog=5
    )
    assert result.log_evidence.item() == pytest.approx(1.0, abs=4 * result.log_evidence_se.item())
    assert result.log_evidence_se < 0.4
    assert result.acceptance.item() == pytest.approx(0.65, abs=0.1)


def test_no_density_on_one_side():
    """NaN for u < 0: half of the mass of the start, and no density there."""
    start = dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1)
    result = annealed_importance_sampling(
        lambda u: start.log_prob(u) + 0 * u[..., 0].sqrt(), start, num_chains=4000, num_steps=3
    )
    error = result.log_evidence.item() - math.log(0.5)
    assert abs(error) < 4 * result.log_evidence_se.item()
    alive = result.log_weights > -math.inf
    assert (result.samples[alive] > 0).all()


def test_float32_stays():
    x = X[:2].float()
    prior = prior_of(x)
    result = annealed_importance_sampling(
        lambda u: prior.log_prob(u) + dist.Normal(u @ W.T.float(), SD).to_event(1).log_prob(x),
        prior,
        num_steps=3,
        num_leapfrog=2,
    )
    assert result.samples.dtype == torch.float32
    assert result.log_weights.dtype == torch.float64


# --- Pyro models ---

COUNTS = torch.tensor([3.0, 1.0, 4.0, 2.0])


def poisson(x=COUNTS):
    """rate ~ Gamma(2, 1), x_n ~ Poisson(rate)."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def poisson_evidence():
    a, b, n, total = 2.0, 1.0, len(COUNTS), COUNTS.sum().item()
    log_p = a * math.log(b) - math.lgamma(a) + math.lgamma(a + total)
    return log_p - (a + total) * math.log(b + n) - (COUNTS + 1).lgamma().sum().item()


def poisson_guide(x=COUNTS):
    pyro.sample("rate", dist.LogNormal(1.0, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["prior", "by-hand", "auto", "flow"])
def test_evidence_of_a_model(start):
    guide = None
    if start == "by-hand":
        guide = poisson_guide
    elif start == "auto":
        guide = AutoMultivariateNormal(poisson, init_scale=0.5)
    elif start == "flow":
        guide = AutoPlanar(poisson, num_layers=2, init_scale=0.5)
    result = log_evidence_ais(poisson, guide=guide, num_chains=64, num_steps=40, num_leapfrog=3)
    assert result.log_evidence.shape == ()
    error = result.log_evidence.item() - poisson_evidence()
    assert abs(error) < 4 * result.log_evidence_se.item()
    assert result.log_evidence_se < 0.15
    # Gamma(12, 5): mean 2.4, sd .69
    assert result.samples.exp().mean().item() == pytest.approx(2.4, abs=4 * 0.69 / 8)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["prior", "guide"])
def test_evidence_by_datum(start):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x[:, :2], 1.5).to_event(1))

    result = log_evidence_ais(
        local,
        X,
        guide=guide if start == "guide" else None,
        plate="data",
        num_chains=32,
        num_steps=100,
        num_leapfrog=4,
    )
    assert result.log_evidence.shape == (5,)
    error = result.log_evidence - log_evidence(X)
    assert (error.abs() < 4 * result.log_evidence_se).all()
    assert (result.log_evidence_se < 0.6).all()
    assert "log evidence of 5 data" in str(result)


# --- refusals ---


def subsampled(x=COUNTS):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as index:
        pyro.sample("x", dist.Poisson(rate), obs=x[index])


def wrong_sum(x=COUNTS):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.factor("x", dist.Poisson(rate).log_prob(x).sum())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": subsampled}, ValueError, "subsamples 2 of 4"),
        ({"model": wrong_sum}, ValueError, "many chains at once"),
        ({"plate": "data"}, ValueError, "outside of plate 'data'"),
        ({"guide": AutoNormal(poisson)}, TypeError, "AutoContinuous"),
        ({"guide": lambda: None}, TypeError, "AutoContinuous"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_chains": 1.5}, ValueError, "num_chains"),
    ],
    ids=["subsample", "sum", "global", "auxiliary", "empty", "steps", "chains"],
)
def test_refusals(options, error, message):
    model = options.pop("model", poisson)
    with pytest.raises(error, match=message):
        log_evidence_ais(model, **options)


def test_one_guide_for_all_data_has_no_density_by_datum():
    with pytest.raises(TypeError, match="by hand"):
        log_evidence_ais(local, X, guide=AutoMultivariateNormal(local), plate="data")


def test_shapes_have_to_fit():
    start = dist.Normal(torch.zeros(2), 1.0)  # two numbers, each with a density of its own
    with pytest.raises(ValueError, match="start: expected one number a row"):
        annealed_importance_sampling(lambda u: u.sum(-1), start, num_steps=1)
