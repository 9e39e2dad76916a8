"""Where guides begin: Gaussians found on targets whose answer is known, and on those where one recipe fails."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal

from pyro_flows_ext.guides import AutoPlanar, AutoSylvester
from pyro_flows_ext.infer import fit, warm_start
from pyro_flows_ext.infer.gaussian import Gaussian, climb, fit_gaussian, laplace, pathfinder
from pyro_flows_ext.programs import LogJoint

LOC = torch.tensor([300.0, -2.0, 0.05], dtype=torch.float64)
SCALE_TRIL = torch.tensor([[50.0, 0, 0], [1.0, 2.0, 0], [0.01, -0.02, 0.001]], dtype=torch.float64)


def gaussian():
    """Badly scaled and correlated: sds from .02 to 50."""
    pyro.sample("x", dist.MultivariateNormal(LOC, scale_tril=SCALE_TRIL))


def funnel():
    """Neal's funnel, whose density has no maximum."""
    v = pyro.sample("v", dist.Normal(0.0, 1.5))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def walled():
    """A log joint of NaN for x > 3, as an ODE solver gives far out."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(x > 3, torch.nan, 0.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def flat():
    """A flat prior on a positive scale and a location."""
    y = torch.tensor([1.0, 2.0, 4.0])
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    s = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, s), obs=y)


def wide(dim=200):
    scale = torch.logspace(-2, 2, dim, dtype=torch.float64)
    pyro.sample("x", dist.Normal(scale, scale).to_event(1))


def target_of(model, *args, **options):
    guide = AutoPlanar(model, num_layers=1)
    guide.setup(*args)
    return LogJoint(model, args, latents=guide._latents(), **options)


def unit(target):
    D = target.dim
    return Gaussian(torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64))


# --- the density ---


@pytest.mark.parametrize("method", ["handlers", "vmap", "loop"])
def test_log_density_is_the_models(method):
    def model():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.ones(2, 3))

    target = target_of(model)
    target.method = method
    torch.manual_seed(0)
    u = torch.randn(4, target.dim)
    tau, theta = u[:, 0].exp(), u[:, 1:].reshape(4, 2, 3)
    expected = dist.LogNormal(0.0, 1.0).log_prob(tau) + u[:, 0]
    expected = expected + dist.Normal(0.0, tau[:, None, None]).log_prob(theta).sum((1, 2))
    expected = expected + dist.Normal(theta, 1.0).log_prob(torch.ones(2, 3)).sum((1, 2))
    torch.testing.assert_close(target(u), expected)


def test_hessian_and_gradient():
    target = target_of(gaussian)
    precision = torch.cholesky_inverse(SCALE_TRIL)
    u = LOC + torch.randn(3, dtype=torch.float64)
    torch.testing.assert_close(target.hessian(u), -precision)
    value, gradient = target.value_and_gradient(u.unsqueeze(0))
    torch.testing.assert_close(gradient[0], -precision @ (u - LOC))
    torch.testing.assert_close(
        value[0], dist.MultivariateNormal(LOC, scale_tril=SCALE_TRIL).log_prob(u)
    )


def test_a_value_without_density_is_told_and_has_no_gradient():
    value, gradient = target_of(walled).value_and_gradient(torch.tensor([[0.0], [5.0]]))
    assert value.isfinite().tolist() == [True, False]
    assert value[1] == -math.inf
    assert gradient[1] == 0


# --- the recipes ---


def assert_is_the_posterior(found, tolerance):
    """Within `tolerance` of the truth in its own whitened coordinates."""
    whiten = torch.linalg.inv(SCALE_TRIL)
    assert (whiten @ (found.loc - LOC)).abs().max() < tolerance
    covariance = whiten @ found.scale_tril @ found.scale_tril.mT @ whiten.mT
    assert (covariance - torch.eye(3)).abs().max() < tolerance
    assert (found.scale_tril.diagonal() > 0).all()


def test_laplace_is_exact_for_a_gaussian():
    target = target_of(gaussian)
    points, _ = climb(target, torch.zeros(3, dtype=torch.float64))
    assert_is_the_posterior(laplace(target, points[-1]), 1e-3)


def test_laplace_refuses_what_is_no_maximum():
    def convex():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("up", x**2)

    assert laplace(target_of(convex), torch.zeros(1)) is None


def test_pathfinder_comes_near():
    torch.manual_seed(0)
    target = target_of(gaussian)
    points, gradients = climb(target, torch.zeros(3, dtype=torch.float64))
    found = pathfinder(target, points, gradients)
    noise = torch.randn(1000, 3, dtype=torch.float64)
    assert found.elbo(target, noise) > -1.0  # log Z = 0
    assert unit(target).elbo(target, noise) < -1e3


def test_pathfinder_of_a_single_point_is_none():
    u = torch.zeros(2)
    assert pathfinder(target_of(funnel), [u], [u]) is None


def test_an_ascent_from_where_there_is_no_density():
    assert climb(target_of(walled), torch.tensor([5.0])) == ([], [])


def test_full_rank_run_finds_the_posterior_near_its_start():
    torch.manual_seed(0)
    bend = torch.tensor([[2.0, 0, 0], [0.5, 0.5, 0], [1.0, -1.0, 1.5]], dtype=torch.float64)
    start = Gaussian(LOC + SCALE_TRIL.sum(1), SCALE_TRIL @ bend)
    found = fit_gaussian(target_of(gaussian), start, full_rank=True, num_steps=600)
    assert_is_the_posterior(found, 0.02)  # sticking the landing: no noise is left at the end


def test_elbo_of_the_exact_posterior_is_the_evidence():
    """Without any noise: log p - log q is constant."""
    noise = torch.randn(2, 3, dtype=torch.float64)
    assert Gaussian(LOC, SCALE_TRIL).elbo(target_of(gaussian), noise) == pytest.approx(
        0.0, abs=1e-8
    )


# --- the choice ---


def begun(model, *args, seed=0):
    pyro.set_rng_seed(seed)
    guide = AutoSylvester(model, num_layers=1)
    return warm_start(model, guide, *args), guide


def test_badly_scaled_gaussian():
    found, guide = begun(gaussian)
    assert found.elbos[found.name] == max(found.elbos.values()) > -0.05
    assert found.elbos["start"] < -1e3
    torch.testing.assert_close(guide.whitening.loc, found.loc)
    torch.testing.assert_close(guide.whitening.scale_tril, found.scale_tril)


@pytest.mark.slow
def test_funnel_is_not_started_at_its_peak():
    found, _ = begun(funnel)
    assert found.elbos[found.name] > -1.2
    assert max((v for k, v in found.elbos.items() if k.startswith("laplace")), default=-9) < -1.2
    assert abs(found.loc[0]) < 1.5


@pytest.mark.slow
def test_flat_priors():
    found, _ = begun(flat)
    assert math.isfinite(found.elbos[found.name])
    assert abs(found.loc[0] - 7 / 3) < 0.5


def test_values_without_density_are_survived():
    found, _ = begun(walled)
    assert abs(found.loc[0] - 0.5) < 0.2


@pytest.mark.slow
def test_many_latents():
    found, _ = begun(wide)
    assert "diagonal" in found.elbos
    assert found.elbos[found.name] > -1.0


def test_under_subsampling_only_gradient_runs():
    y = torch.randn(20)

    def subsampled():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 20, subsample_size=5) as i:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    found, _ = begun(subsampled)
    assert set(found.elbos) == {"start", "mean-field", "full-rank"}
    assert abs(found.loc[0] - y.mean()) < 0.3


def test_no_density_anywhere_is_an_error():
    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("never", x * 0 - math.inf)

    with pytest.raises(ValueError, match="no candidate has a finite ELBO"):
        begun(impossible)


def test_a_guide_that_cannot_be_whitened_is_refused():
    with pytest.raises(TypeError, match="expected an AutoFlow"):
        warm_start(gaussian, AutoNormal(gaussian))


# --- in training ---


def test_fit_starts_new_guides_warm_and_no_others():
    options = {"num_steps": 2, "progress": False, "seed": 0}
    guide = AutoPlanar(gaussian, num_layers=1)
    first = fit(gaussian, guide, **options)
    assert first.elbo > -1.0
    assert first.warm_start.name in first.warm_start.elbos
    assert fit(gaussian, guide, **options).warm_start is None
    pyro.clear_param_store()
    cold = fit(gaussian, AutoPlanar(gaussian, num_layers=1), warm_start=False, **options)
    assert cold.warm_start is None
    assert cold.elbo < -1e3
    pyro.clear_param_store()
    assert fit(gaussian, AutoNormal(gaussian), **options).warm_start is None


def test_fit_refuses_other_words():
    with pytest.raises(ValueError, match='warm_start: expected True, False or "auto"'):
        fit(gaussian, AutoPlanar(gaussian), warm_start="laplace")
