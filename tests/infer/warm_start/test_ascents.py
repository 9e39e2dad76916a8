"""Batch and match, natural gradients and stochastic gradients on targets with known answers."""

import math

import pytest
import torch
from closed_forms import Density, banana, funnel, normal, random_normal

from pyro_flows_ext.infer.warm_start import DenseGaussian, LowRankGaussian
from pyro_flows_ext.infer.warm_start.batch_and_match import BatchAndMatch, truncated_elbo
from pyro_flows_ext.infer.warm_start.natural_gradient import natural_gradient
from pyro_flows_ext.infer.warm_start.stochastic_gradient import stochastic_gradient


def unit(dim):
    return LowRankGaussian.isotropic(torch.zeros(dim, dtype=torch.float64))


def noise(dim, num=2000):
    return torch.randn(num, dim, dtype=torch.float64)


def assert_is(found, loc, scale_tril, tolerance):
    """Mean and covariance within `tolerance` in the coordinates in which the truth is standard normal."""
    whiten = torch.linalg.inv(scale_tril)
    assert (whiten @ (found.loc - loc)).abs().max() < tolerance
    covariance = whiten @ found.scale_tril @ found.scale_tril.mT @ whiten.mT
    assert (covariance - torch.eye(len(loc))).abs().max() < tolerance
    assert (found.scale_tril.diagonal() > 0).all()


# --- batch and match ---


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_batch_and_match_is_exact_for_a_normal(dim):
    target, loc, scale_tril = random_normal(dim, spread=1.0)
    run = BatchAndMatch(target.value_and_gradient, [unit(dim)], 4 * dim + 16)
    for _ in range(60):
        run.step()
    assert_is(run.gaussians[0], loc, scale_tril, 1e-3)
    assert run.elbos[-1].item() == pytest.approx(0, abs=1e-3)


def test_batch_and_match_from_near_a_badly_scaled_normal():
    """Scales of 1e-4 to 1e4, whose covariances have no inverse in double precision."""
    target, loc, scale_tril = random_normal(6, spread=4.0)
    near = DenseGaussian(loc + scale_tril.sum(1), 2 * scale_tril)
    (found,) = BatchAndMatch(target.value_and_gradient, [near], 64).run(40)
    assert_is(found, loc, scale_tril, 1e-3)


def test_batch_and_match_runs_several_side_by_side():
    target, loc, scale_tril = random_normal(3, spread=0.5)
    far = LowRankGaussian.isotropic(loc + 10.0, 3.0)
    run = BatchAndMatch(target.value_and_gradient, [unit(3), far], 32)
    rows = target.num_rows
    run.step()
    assert target.num_rows - rows == 64
    for found in run.run(60):
        assert_is(found, loc, scale_tril, 0.02)


def test_batch_and_match_stops_when_level():
    target, loc, scale_tril = random_normal(3, spread=0.5)
    run = BatchAndMatch(target.value_and_gradient, [DenseGaussian(loc, scale_tril)], 32)
    run.run(40)
    assert len(run.elbos) == 10


def test_batch_and_match_with_fewer_draws_than_latents():
    target, _loc, _scale_tril = random_normal(30, spread=0.3)
    run = BatchAndMatch(target.value_and_gradient, [unit(30)], 12)
    for _ in range(150):
        run.step()
    assert run.gaussians[0].elbo(target, noise(30)) > -0.2


def test_batch_and_match_leaves_out_draws_without_density():
    """N(0, 1) with a wall at 1: the scores are those of the normal, wherever there are any."""
    target = Density(lambda u: torch.where(u[:, 0] > 1, torch.nan, -(u[:, 0] ** 2) / 2), 1)
    run = BatchAndMatch(target.value_and_gradient, [unit(1)], 64)
    for _ in range(30):
        run.step()
    found = run.gaussians[0]
    assert abs(found.loc) < 0.05
    assert found.scale_tril.item() == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_batch_and_match_shrinks_where_nothing_has_density():
    target = Density(
        lambda u: torch.where(u.norm(dim=-1) > 0.5, torch.nan, -50 * u.square().sum(-1)), 3
    )
    run = BatchAndMatch(
        target.value_and_gradient, [LowRankGaussian.isotropic(torch.zeros(3).double(), 9.0)], 32
    )
    run.step()
    torch.testing.assert_close(run.gaussians[0].scale_tril, 4.5 * torch.eye(3).double())
    for _ in range(20):
        run.step()
    assert_is(run.gaussians[0], torch.zeros(3).double(), 0.1 * torch.eye(3).double(), 0.2)


def test_elbos_are_those_of_the_gaussians():
    target = banana()
    run = BatchAndMatch(target.value_and_gradient, [unit(2)], 4000)
    for _ in range(3):
        before = run.gaussians[0].elbo(target, noise(2, 4000))
        run.step()
        assert run.elbos[-1].item() == pytest.approx(before, abs=0.15)


def test_elbo_of_a_truncated_gaussian():
    """q restricted to where p has a density has the ELBO of these draws plus the log of their share."""
    weights = torch.tensor([[0.0, 2.0, -math.inf, 1.0], [1.0, -math.inf, -math.inf, math.nan]])
    expected = [1.0 + math.log(0.75), -math.inf]
    assert truncated_elbo(weights.double()).tolist() == pytest.approx(expected)


# --- natural gradients ---


@pytest.mark.parametrize("dim", [1, 5])
def test_natural_gradient_is_exact_for_a_normal(dim):
    target, loc, scale_tril = random_normal(dim)
    bend = torch.eye(dim) + 0.5 * torch.ones(dim, dim).tril()
    start = DenseGaussian(loc + scale_tril.sum(1), scale_tril @ bend.double())
    found, elbos = natural_gradient(target.value_and_gradient, start, num_steps=60, num_draws=64)
    assert_is(found, loc, scale_tril, 0.02)  # no noise is left at the end
    assert elbos[0] < -0.5
    assert elbos[-1] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("target", "bound"), [(banana(), -0.55), (funnel(), -0.8)], ids=["banana", "funnel"]
)
def test_natural_gradient_raises_the_elbo(target, bound):
    (start,) = BatchAndMatch(target.value_and_gradient, [unit(target.dim)], 64).run(40)
    found, _ = natural_gradient(target.value_and_gradient, start, num_steps=100, num_draws=64)
    common = noise(target.dim, 20_000)
    assert found.elbo(target, common) > max(bound, start.elbo(target, common) - 0.01)


def test_natural_gradient_stays_finite_on_heavy_tails_and_walls():
    def cauchy(u):
        value = -torch.log1p(u.square()).sum(-1)
        return torch.where(u[:, 0] > 20, torch.nan, value)

    target = Density(cauchy, 2)
    start = LowRankGaussian.isotropic(torch.zeros(2).double(), 30.0)
    found, _ = natural_gradient(target.value_and_gradient, start, num_steps=80, num_draws=64)
    assert found.scale_tril.isfinite().all()
    assert 0.5 < found.scale_tril.diagonal().min() < found.scale_tril.diagonal().max() < 10


def test_natural_gradient_shrinks_where_nothing_has_density():
    target = Density(lambda u: torch.where(u[:, 0].abs() > 1e-3, torch.nan, -u[:, 0]), 1)
    found, elbos = natural_gradient(target.value_and_gradient, unit(1), num_steps=1, num_draws=8)
    assert found.scale_tril.item() == pytest.approx(0.5)
    assert elbos == [-math.inf]


# --- stochastic gradients ---


@pytest.mark.slow
def test_stochastic_gradient_finds_the_posterior_near_its_start():
    target, loc, scale_tril = random_normal(3)
    bend = torch.tensor([[2.0, 0, 0], [0.5, 0.5, 0], [1.0, -1.0, 1.5]]).double()
    start = DenseGaussian(loc + scale_tril.sum(1), scale_tril @ bend)
    found = stochastic_gradient(target.value_and_gradient, start, full_rank=True, num_steps=400)
    assert_is(found, loc, scale_tril, 0.02)  # sticking the landing: no noise is left at the end


def test_stochastic_gradient_with_a_diagonal_scale():
    loc, scales = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.3, 2.0]).double()
    target = normal(loc, scales.diag())
    found = stochastic_gradient(
        target.value_and_gradient, unit(2), full_rank=False, num_steps=400, initial_scale=0.1
    )
    assert_is(found, loc, scales.diag(), 0.02)
