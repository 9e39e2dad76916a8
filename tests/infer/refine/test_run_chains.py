"""`run_chains` against closed forms, its budgets, and what it leaves alone."""

import math

import pytest
import torch
from chain_targets import correlated, gamma, truncated, truncated_mean, z_score
from torch import nn

from pyro_flows_ext.infer.refine import Tuning, run_chains
from pyro_flows_ext.infer.refine.adaptation import MAX_DIVERGENT, without_divergences
from pyro_flows_ext.infer.refine.leapfrog import divergent_share
from pyro_flows_ext.transforms import Whitening, planar


def noise(chains, dim, dtype=torch.float64):
    return torch.randn(chains, dim, dtype=dtype)


@pytest.mark.parametrize("dim", [1, 4, 30])
def test_moments_of_a_correlated_gaussian(dim):
    target, L = correlated(dim, 0.8 if dim > 1 else 0.0)
    result = run_chains(target, None, 1 + noise(128, dim) @ L.mT, num_transitions=60)
    for i in range(min(dim, 4)):
        assert z_score(result.u[..., i], 1.0) < 4
        assert z_score((result.u[..., i] - 1).square(), 1.0) < 4
    assert result.r_hat.max() < 1.1
    assert 0.7 < result.acceptance.mean() < 0.9


@pytest.mark.parametrize("shape", [1.5, 4.0])
def test_moments_of_a_skewed_density(shape):
    result = run_chains(
        gamma(shape), None, math.log(shape) + 0.5 * noise(256, 3), num_transitions=150
    )
    x = result.u[:, 50:].exp()
    assert z_score(x[..., 0], shape) < 4
    assert z_score(x[..., 1].square(), shape + shape**2) < 4


def test_regions_without_density_are_not_entered():
    result = run_chains(truncated, None, noise(128, 2).abs(), num_transitions=100)
    assert result.num_gradients < 1000
    assert (result.u > 0).all()
    assert z_score(result.u[:, 20:, 0], truncated_mean()) < 4


def test_a_narrow_region_behind_nan_is_left():
    def target(u):
        return torch.where(u[..., 0] > 4, torch.nan, -u.square().sum(-1) / 2)

    result = run_chains(target, None, noise(64, 3), num_transitions=30)
    assert result.u.isfinite().all()
    assert result.log_density.isfinite().all()


def test_the_density_in_the_coordinates_of_a_flow_is_the_target():
    """A nonlinear transform with perturbed parameters changes the coordinates and not the distribution."""
    target, _ = correlated(3, 0.5)
    flow = planar(3, num_layers=4).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.5 * torch.randn_like(p))
    result = run_chains(target, flow, noise(128, 3), num_transitions=100)
    u = result.u[:, 40:]
    torch.testing.assert_close(flow.forward_and_ladj(result.z)[0].detach(), result.u)
    for i in range(3):
        assert z_score(u[..., i], 1.0) < 4
        assert z_score((u[..., i] - 1).square(), 1.0) < 4
    assert z_score((u[..., 0] - 1) * (u[..., 1] - 1), 0.5) < 4
    assert all(p.grad is None and p.requires_grad for p in flow.parameters())


def test_one_transition_leaves_the_target_invariant():
    """From exact draws, at a step size so large that half of the proposals are rejected, the moments stay."""
    x = torch.distributions.Gamma(2.0, 1.0).sample((4000, 1)).double().log()
    result = run_chains(gamma(2.0), None, x, num_transitions=5, tuning=Tuning(1.6, 3))
    assert result.acceptance.mean() < 0.75
    for s in range(5):
        last = result.u[:, s, 0].exp()
        assert abs(last.mean() - 2) < 4 * math.sqrt(2 / 4000)
        assert abs(last.square().mean() - 6) < 4 * math.sqrt(84 / 4000)


def test_trajectories_lengthen_for_a_wide_direction():
    scale = torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    narrow = run_chains(lambda u: -u.square().sum(-1) / 2, None, noise(128, 5), num_transitions=2)
    wide = run_chains(
        lambda u: -(u / scale).square().sum(-1) / 2, None, scale * noise(128, 5), num_transitions=30
    )
    length = wide.tuning.step_size * wide.tuning.num_leapfrog
    assert length > 1.5 * narrow.tuning.step_size * narrow.tuning.num_leapfrog
    assert wide.r_hat.max() < 1.25


@pytest.mark.parametrize("start", [0.01, 1.0, 30.0])
def test_the_step_size_finds_the_scale_of_the_target(start):
    """The first step size suits a unit scale; the target's is off by up to 100."""
    result = run_chains(
        lambda u: -(u / start).square().sum(-1) / 2,
        None,
        start * noise(128, 10),
        num_transitions=30,
    )
    assert 0.65 < result.acceptance.mean() < 0.92
    assert 0.3 < result.tuning.step_size / start < 1.5


@pytest.mark.parametrize("budget", [1, 25, 60])
def test_budget_of_gradients(budget):
    calls = []

    def target(u):
        calls.append(len(u))
        return -u.square().sum(-1) / 2

    result = run_chains(target, None, noise(16, 5), num_transitions=1000, max_gradients=budget)
    assert len(calls) == result.num_gradients
    # One transition is made whatever the budget.
    assert len(calls) <= max(budget, 1 + result.tuning.num_leapfrog)
    assert result.u.shape[1] >= 1


def test_budget_of_seconds():
    result = run_chains(
        lambda u: -u.square().sum(-1) / 2, None, noise(8, 2), num_transitions=10**6, max_seconds=0.3
    )
    assert 1 <= result.u.shape[1] < 10**6
    assert result.seconds < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_the_generator_decides(dtype):
    target, L = correlated(3, 0.5, dtype)
    whitening = Whitening(torch.ones(3, dtype=dtype), L)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(run_chains(target, whitening, noise(32, 3, dtype), num_transitions=12))
    assert runs[0].u.dtype == runs[0].z.dtype == runs[0].log_density.dtype == dtype
    assert torch.equal(runs[0].u, runs[1].u)
    assert abs(runs[0].u.mean() - 1) < 0.3


def test_starts_without_density_are_replaced():
    z0 = noise(64, 2).abs()
    z0[:20] = -1.0
    result = run_chains(truncated, None, z0, num_transitions=10)
    assert result.num_dead == 20
    assert (result.start > 0).all()
    with pytest.raises(ValueError, match="got none"):
        run_chains(truncated, None, -noise(64, 2).abs(), num_transitions=10)


def test_a_run_goes_on():
    target, _ = correlated(2, 0.3)
    first = run_chains(target, None, noise(16, 2), num_transitions=4)
    tuning = Tuning(first.tuning.step_size, 3)
    second = run_chains(target, None, first.z[:, -1], num_transitions=6, tuning=tuning)
    both = first.followed_by(second)
    assert both.u.shape == (16, 10, 2)
    assert both.num_gradients == first.num_gradients + second.num_gradients
    assert torch.equal(both.start, first.start)
    assert torch.equal(both.after(4).u, second.u)
    assert second.num_gradients == 1 + 6 * 3


@pytest.mark.parametrize(
    ("z0", "options", "message"),
    [
        (torch.zeros(3), {}, "z0: expected"),
        (torch.zeros(3, 2, dtype=torch.long), {}, "z0: expected"),
        (torch.zeros(3, 2), {"num_transitions": 0}, "num_transitions"),
        (torch.zeros(3, 2), {"target_acceptance": 1.0}, "target_acceptance"),
        (torch.zeros(3, 2), {"max_gradients": 0}, "max_gradients"),
        (torch.zeros(3, 2), {"max_seconds": -1.0}, "max_seconds"),
    ],
)
def test_wrong_arguments(z0, options, message):
    with pytest.raises(ValueError, match=message):
        run_chains(lambda u: -u.square().sum(-1), None, z0, **options)


def test_modules_are_left_as_they_were():
    flow = nn.ModuleList([planar(2).double()])
    flow[0].u.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in flow.named_parameters()}
    run_chains(lambda u: -u.square().sum(-1) / 2, flow[0], noise(8, 2), num_transitions=3)
    for name, p in flow.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None


def test_a_start_far_out_is_seen():
    target, _ = correlated(2, 0.3)
    settled = run_chains(target, None, noise(64, 2), num_transitions=24)
    assert not settled.is_transient
    assert settled.num_stuck == 0
    z0 = settled.z[:, -1].clone()
    z0[5] = 40.0
    tuning = Tuning(0.2, 2)
    moving = run_chains(target, None, z0, num_transitions=24, tuning=tuning)
    assert moving.is_transient
    assert run_chains(target, None, z0, num_transitions=3, tuning=tuning).num_stuck == 1


def test_divergent_trajectories_shorten_the_step() -> None:
    tuning = Tuning(0.8, 4, 2)
    assert without_divergences(tuning, 1.0, 0.0, 64) == Tuning(1.0, 4, 2)
    # Near the limit the step does not grow; above it, it shrinks, and trajectories keep their length.
    assert without_divergences(tuning, 1.0, MAX_DIVERGENT / 2, 64) == tuning
    shorter = without_divergences(tuning, 1.0, 16 * MAX_DIVERGENT, 64)
    assert shorter == Tuning(0.4, 8, 4)
    assert without_divergences(tuning, 1.0, 1.0, 6).num_leapfrog == 6


def test_trajectories_that_end_without_density_do_not_diverge() -> None:
    acceptance = torch.tensor([0.0, 1.0, 0.5, 1e-6])
    assert float(divergent_share(acceptance)) == 0.25


@pytest.mark.parametrize(("step_size", "diverges"), [(0.7, True), (0.05, False)])
def test_chains_in_a_banana_diverge_at_a_long_step(step_size: float, diverges: bool) -> None:
    def banana(u: torch.Tensor) -> torch.Tensor:
        x, y = u.unbind(-1)
        return -(x.square() + (4 * (y - x.square())).square()) / 2

    torch.manual_seed(0)
    x = torch.randn(128)
    z0 = torch.stack([x, x.square() + torch.randn(128) / 4], -1)
    chains = run_chains(banana, None, z0, num_transitions=8, tuning=Tuning(step_size, 4))
    assert (chains.divergent > MAX_DIVERGENT) == diverges
