"""The search on densities, and the warm start of guides: where one recipe fails, and where the answer is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from closed_forms import Density, banana, funnel, normal, random_normal, two_modes
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal

from pyro_flows_ext.guides import AutoSylvester
from pyro_flows_ext.infer.warm_start import (
    LowRankGaussian,
    find_gaussian,
    search,
    warm_start,
)
from pyro_flows_ext.infer.warm_start.search import Plan
from pyro_flows_ext.infer.warm_start.target import MeasuredTarget


def start_of(target, dtype=torch.float64, scale=0.1):
    return LowRankGaussian.isotropic(torch.zeros(target.dim, dtype=dtype), scale)


def elbo(found, target, num=5000):
    return found.gaussian.elbo(target, torch.randn(num, target.dim).to(found.gaussian.loc))


# --- densities ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 4, 30])
def test_normals_are_found_in_the_targets_dtype(dim, dtype):
    target, _loc, scale_tril = random_normal(dim, spread=1.0)
    found = find_gaussian(target, start_of(target, dtype))
    assert target.dtypes == {dtype}
    assert found.gaussian.loc.dtype == found.gaussian.scale_tril.dtype == dtype
    assert found.modes[0].loc.dtype == dtype
    whitened = torch.linalg.inv(scale_tril) @ found.gaussian.scale_tril.double()
    torch.testing.assert_close(whitened @ whitened.mT, torch.eye(dim).double(), atol=0.02, rtol=0)
    assert elbo(found, target) == pytest.approx(0, abs=0.02)
    assert found.elbos[found.name] > found.elbos["start"]


@pytest.mark.parametrize(
    ("target", "bound"),
    [(banana(), -0.5), (funnel(), -0.8), (funnel(10), -1.3)],
    ids=["banana", "funnel", "funnel-10"],
)
def test_elbos_near_the_best_gaussian(target, bound):
    assert elbo(find_gaussian(target, start_of(target)), target, 20_000) > bound


def test_badly_scaled_normal():
    target, _loc, _scale_tril = random_normal(10, spread=4.0)
    found = find_gaussian(target, start_of(target))
    assert elbo(found, target) > -0.1
    assert found.elbos["start"] < -1e3


def test_modes_are_told():
    target = two_modes(distance=3.0)
    found = find_gaussian(target, start_of(target), overdispersed=torch.tensor([[3.0, 3.1]] * 3))
    assert len(found.modes) == 2
    assert found.modes[0].log_mass > found.modes[1].log_mass
    assert sum(mode.num_climbs for mode in found.modes) == 8
    torch.testing.assert_close(found.modes[1].loc, torch.full((2,), 3.0).double(), atol=0.1, rtol=0)


def test_results_are_those_of_the_seed():
    target = funnel()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(find_gaussian(target, start_of(target)))
    assert runs[0].elbos == runs[1].elbos
    torch.testing.assert_close(runs[0].gaussian.loc, runs[1].gaussian.loc, rtol=0, atol=0)


def test_a_diagonal_is_learned_above_the_largest_dense_scale(monkeypatch):
    monkeypatch.setattr(search, "MAX_DENSE", 3)
    monkeypatch.setattr(search, "MAX_FULL_RANK", 2)
    monkeypatch.setattr(search, "NUM_DIAGONAL_STEPS", 150)
    target, _, _ = random_normal(4, spread=0.3)
    found = find_gaussian(target, start_of(target))
    assert set(found.elbos) >= {"start", "pathfinder 0", "mean-field", "diagonal"}
    assert not any("match" in name or "natural" in name for name in found.elbos)
    assert found.elbos["diagonal"] > -1.0


def test_many_latents_whose_mode_is_far_from_the_mass():
    """y_j ~ N(exp(s) a_j, 1), a_j ~ N(0, 1), s ~ N(0, 1): a sums out to y_j ~ N(0, 1 + exp(2 s))."""
    num = 200
    y = 2.5 * torch.randn(num, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def log_density(u):
        s, a = u[:, :1], u[:, 1:]
        prior = -u.square().sum(-1) / 2
        return prior - (y.to(u) - s.exp() * a).square().sum(-1) / 2

    target = Density(log_density, num + 1)
    found = find_gaussian(target, start_of(target))
    s = torch.linspace(-3, 3, 2001, dtype=torch.float64)
    scale = (1 + (2 * s).exp()).sqrt()
    log_p = -s.square() / 2 + dist.Normal(0.0, scale[:, None]).log_prob(y).sum(-1)
    weights = log_p.softmax(0)
    mean = (weights * s).sum()
    sd = (weights * (s - mean).square()).sum().sqrt()
    assert found.name == "curvature of mean-field"
    assert abs(found.gaussian.loc[0] - mean) < sd
    assert found.elbos[found.name] > max(v for k, v in found.elbos.items() if "field" not in k) + 10


@pytest.mark.slow
def test_three_hundred_latents():
    target, _, _ = random_normal(300, spread=0.5)
    found = find_gaussian(target, start_of(target))
    assert elbo(found, target, 500) > -1.0


def test_a_density_that_raises_for_most_draws_is_survived():
    def narrow(u):
        if len(u) > 8 and (u.abs() > 2).any(-1).double().mean() > 0.5:
            raise ValueError("the model rejects these")
        return torch.where((u.abs() > 2).any(-1), torch.nan, -50 * u.square().sum(-1))

    target = Density(narrow, 12)
    found = find_gaussian(target, start_of(target))
    torch.testing.assert_close(
        found.gaussian.scale_tril, 0.1 * torch.eye(12).double(), atol=0.01, rtol=0
    )


def test_an_error_of_the_model_is_the_cause_of_the_failure():
    def broken(u):
        raise ValueError("a bug in the model")

    with pytest.raises(ValueError, match="no candidate with a finite ELBO") as caught:
        find_gaussian(Density(broken, 2), start_of(Density(broken, 2)))
    assert "a bug in the model" in str(caught.value.__cause__)


# --- how much of what ---


class Priced(MeasuredTarget):
    """A target whose gradients take `fixed + price * rows` seconds."""

    def __init__(self, dim, fixed, price):
        super().__init__(normal(torch.zeros(dim), torch.eye(dim)), torch.zeros(dim))
        self._seconds = {1: fixed + price, 101: fixed + 101 * price}


def test_seconds_are_interpolated():
    assert Priced(2, 0.5, 0.01).seconds(64) == pytest.approx(1.14)


def test_the_plan_is_full_where_gradients_are_cheap():
    plan = Plan.make(Priced(10, 4e-3, 1e-5), 20.0)
    assert (plan.num_climbs, plan.num_starts, plan.num_batches) == (8, 2, 40)
    assert plan.with_hessian
    assert plan == Plan.make(Priced(10, 8e-3, 2e-5), 20.0)


@pytest.mark.parametrize(("dim", "price"), [(10, 0.02), (501, 4e-3), (501, 0.05)])
def test_the_plan_keeps_to_its_budget(dim, price):
    target = Priced(dim, 1e-3, price)
    plan = Plan.make(target, 20.0)
    seconds = (
        plan.climb_evaluations * target.seconds(plan.num_climbs)
        + plan.num_batches * target.seconds(plan.num_starts * plan.num_draws)
        + plan.num_steps * target.seconds(plan.step_draws)
    )
    least = 4 * target.seconds(plan.num_draws)  # batches that are always made
    assert seconds < 20 + least
    assert plan.num_starts == 1


# --- models and guides ---

LOC = torch.tensor([300.0, -2.0, 0.05], dtype=torch.float64)
SCALE_TRIL = torch.tensor([[50.0, 0, 0], [1.0, 2.0, 0], [0.01, -0.02, 0.001]], dtype=torch.float64)


def gaussian():
    """Badly scaled and correlated: sds from .02 to 50."""
    pyro.sample("x", dist.MultivariateNormal(LOC, scale_tril=SCALE_TRIL))


def neal():
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


def begun(model, *args):
    guide = AutoSylvester(model, num_layers=1)
    return warm_start(model, guide, *args), guide


def test_a_guide_is_whitened():
    found, guide = begun(gaussian)
    assert found.elbos[found.name] > -0.05
    assert found.elbos["start"] < -1e3
    torch.testing.assert_close(guide.whitening.loc, found.gaussian.loc)
    torch.testing.assert_close(guide.whitening.scale_tril, found.gaussian.scale_tril)


def test_funnel_is_not_started_at_its_peak():
    found, _ = begun(neal)
    assert found.elbos[found.name] > -1.2
    assert abs(found.gaussian.loc[0]) < 1.5


def test_flat_priors():
    found, _ = begun(flat)
    assert math.isfinite(found.elbos[found.name])
    assert abs(found.gaussian.loc[0] - 7 / 3) < 0.5


def test_values_without_density_are_survived():
    found, _ = begun(walled)
    assert abs(found.gaussian.loc[0] - 0.5) < 0.1
    assert found.gaussian.scale_tril.item() == pytest.approx(0.5**0.5, abs=0.1)


@pytest.mark.slow
def test_under_subsampling_only_gradient_runs():
    y = torch.randn(20)

    def subsampled():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 20, subsample_size=5) as i:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    found, _ = begun(subsampled)
    assert set(found.elbos) == {"start", "mean-field", "full-rank"}
    assert found.name == "full-rank"
    assert found.modes == []
    assert abs(found.gaussian.loc[0] - y.mean()) < 0.3


def test_no_density_anywhere_is_an_error():
    def impossible():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("never", x * 0 - math.inf)

    with pytest.raises(ValueError, match="no candidate with a finite ELBO"):
        begun(impossible)


def test_a_guide_that_cannot_be_whitened_is_refused():
    with pytest.raises(TypeError, match="expected a flow guide over all latents"):
        warm_start(gaussian, AutoNormal(gaussian))


def test_a_clock_that_stands_still_is_no_division_by_zero(monkeypatch):
    monkeypatch.setattr(MeasuredTarget, "_clock", lambda self: 7.0)
    target, loc, _scale_tril = random_normal(3, spread=1.0)
    found = find_gaussian(target, start_of(target))
    torch.testing.assert_close(found.gaussian.loc, loc, rtol=0, atol=0.05)
