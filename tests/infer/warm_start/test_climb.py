"""Ascents in a batch, and the Gaussians along and at the end of them."""

import math

import pytest
import torch
from closed_forms import Density, banana, funnel, normal, random_normal, two_modes

from pyro_flows_ext.infer.warm_start import LowRankGaussian
from pyro_flows_ext.infer.warm_start.climb import climb
from pyro_flows_ext.infer.warm_start.laplace import laplace
from pyro_flows_ext.infer.warm_start.modes import distinct_modes
from pyro_flows_ext.infer.warm_start.pathfinder import pathfinder, quadratics
from pyro_flows_ext.infer.warm_start.target import MeasuredTarget


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def starts(num, dim, spread=2.0):
    return spread * torch.randn(num, dim, dtype=torch.float64)


def test_every_row_reaches_the_mode_of_a_normal():
    target, loc, scale_tril = random_normal(8, spread=1.0)
    paths = climb(target.value_and_gradient, starts(5, 8), max_evaluations=1000)
    top = target(loc.unsqueeze(0))
    for path in paths:
        assert path.converged
        assert path.values[-1] > top - 0.05
        assert (path.values.diff() >= 0).all()
    assert (
        torch.linalg.solve_triangular(
            scale_tril, (paths[0].end - loc).unsqueeze(-1), upper=False
        ).norm()
        < 0.3
    )


def test_a_row_climbs_alike_alone_and_in_a_batch():
    target, u = banana(), starts(4, 2)
    together = climb(target.value_and_gradient, u, max_evaluations=20)
    for row, path in zip(u, together, strict=True):
        (alone,) = climb(target.value_and_gradient, row.unsqueeze(0), max_evaluations=20)
        n = min(len(alone.points), len(path.points))
        assert n > 3
        torch.testing.assert_close(alone.points[:n], path.points[:n])


def test_values_and_gradients_are_those_of_the_points():
    target = banana()
    (path,) = climb(target.value_and_gradient, starts(1, 2))
    value, gradient = target.value_and_gradient(path.points)
    torch.testing.assert_close(path.values, value)
    torch.testing.assert_close(path.gradients, gradient)


def test_rosenbrocks_valley():
    """The hardest two-dimensional ascent of textbooks: its maximum is 0 at (1, 1)."""

    def valley(u):
        x, y = u[:, 0], u[:, 1]
        return -((1 - x) ** 2) - 100 * (y - x**2) ** 2

    (path,) = climb(Density(valley, 2).value_and_gradient, torch.tensor([[-1.2, 1.0]]).double())
    assert path.converged
    torch.testing.assert_close(path.end, torch.ones(2, dtype=torch.float64), atol=0.02, rtol=0)


def test_a_wall_ends_trials_and_not_the_ascent():
    def walled(u):
        return torch.where(u[:, 0] > 3, torch.nan, -((u[:, 0] - 2.9) ** 2) * 50)

    (path,) = climb(Density(walled, 1).value_and_gradient, zeros(1, 1))
    assert path.converged
    assert path.end.item() == pytest.approx(2.9, abs=0.02)


def test_a_start_without_density_has_no_path_and_does_not_disturb_others():
    def walled(u):
        return torch.where(u[:, 0] > 3, torch.nan, -(u[:, 0] ** 2))

    paths = climb(Density(walled, 1).value_and_gradient, torch.tensor([[5.0], [2.0]]).double())
    assert next(len(path.points) for path in paths) == 0
    assert not paths[0].converged
    assert paths[1].end.abs() < 0.05


def test_a_density_without_maximum_does_not_converge():
    def peak(u):  # ∞ at v -> -∞, x = 0
        return -u[:, 0] - u[:, 1] ** 2 * (-2 * u[:, 0]).exp()

    (path,) = climb(Density(peak, 2).value_and_gradient, zeros(1, 2) + 0.1, max_evaluations=30)
    assert not path.converged
    assert len(path.points) > 1


def test_float32():
    target, loc, _ = random_normal(3, spread=0.5)
    (path,) = climb(target.value_and_gradient, torch.zeros(1, 3))
    assert path.points.dtype == torch.float32
    assert target(path.end.unsqueeze(0)) > target(loc.float().unsqueeze(0)) - 0.01


def test_laplace_is_exact_for_a_normal():
    target, loc, scale_tril = random_normal(4)
    found = laplace(target.hessian(loc), loc)
    torch.testing.assert_close(
        found.scale_tril @ found.scale_tril.mT, scale_tril @ scale_tril.mT, rtol=1e-5, atol=1e-10
    )
    assert (found.scale_tril.diagonal() > 0).all()


@pytest.mark.parametrize("hessian", [[[2.0]], [[float("nan")]]], ids=["convex", "nan"])
def test_laplace_refuses_what_is_no_maximum(hessian):
    assert laplace(torch.tensor(hessian), torch.zeros(1)) is None


def test_pathfinder_comes_near():
    target, _loc, _ = random_normal(5, spread=1.0)
    (path,) = climb(target.value_and_gradient, zeros(1, 5))
    found = pathfinder(target, path)
    noise = torch.randn(1000, 5, dtype=torch.float64)
    assert found.elbo(target, noise) > -1.5  # log Z = 0
    assert LowRankGaussian.isotropic(zeros(5)).elbo(target, noise) < -20


def test_pathfinder_sees_the_bulk_of_a_funnel():
    target = funnel()
    (path,) = climb(target.value_and_gradient, starts(1, 4))
    noise = torch.randn(1000, 4, dtype=torch.float64)
    end = laplace(target.hessian(path.end), path.end)
    at_the_end = -math.inf if end is None else end.elbo(target, noise)
    assert pathfinder(target, path).elbo(target, noise) > max(-3.0, at_the_end)


def test_inverse_hessians_of_a_path_fulfil_the_secant_equation():
    """H (g_{t-1} - g_t) = u_t - u_{t-1}, the equation that L-BFGS is made of."""
    (path,) = climb(banana().value_and_gradient, starts(1, 2))
    found = quadratics(path)
    assert len(found) == len(path.points) - 1
    for t, q in enumerate(found, start=1):
        s, z = path.points[t] - path.points[t - 1], path.gradients[t - 1] - path.gradients[t]
        if s @ z > 1e-6 * s.norm() * z.norm():
            torch.testing.assert_close(q.scale_tril @ q.scale_tril.mT @ z, s)


def test_a_path_of_one_point_has_no_gaussian():
    target = normal(zeros(2), torch.eye(2, dtype=torch.float64))
    (path,) = climb(target.value_and_gradient, zeros(1, 2), max_evaluations=1)
    assert len(path.points) == 1
    assert pathfinder(target, path) is None


# --- modes ---


@pytest.mark.parametrize("with_hessian", [True, False], ids=["hessian", "path"])
def test_distinct_modes_with_their_masses(with_hessian):
    target = two_modes()
    u = torch.tensor([[0.5, -0.3], [11.0, 9.5], [9.3, 10.0], [-0.7, 0.1]]).double()
    paths = climb(target.value_and_gradient, u)
    measured = MeasuredTarget(target, u)
    modes, gaussians = distinct_modes(measured, paths, with_hessian=with_hessian)
    assert [mode.num_climbs for mode in modes] == [2, 2]
    tolerance = 0.02 if with_hessian else 0.5
    assert [mode.log_mass for mode in modes] == pytest.approx(
        [math.log(0.8), math.log(0.2)], abs=tolerance
    )
    torch.testing.assert_close(modes[1].loc, zeros(2) + 10, atol=0.02, rtol=0)
    assert len(gaussians) == 2


def test_a_flat_top_is_one_mode():
    """A quartic's curvature vanishes at its maximum, so that distances in its units say nothing."""
    target = Density(lambda u: -(u**4).sum(-1) / 1e4, 2)
    paths = climb(target.value_and_gradient, starts(6, 2, 20.0))
    modes, _ = distinct_modes(MeasuredTarget(target, zeros(1)), paths, with_hessian=False)
    assert len(modes) == 1


def test_newton_steps_arrive_where_an_ascent_crept():
    """Scales of 1e-2 to 1e2: L-BFGS is level more than a nat below the top."""
    target, loc, _ = random_normal(8)
    paths = climb(target.value_and_gradient, starts(5, 8))
    assert any(p.converged and p.values[-1] < target(loc.unsqueeze(0)) - 1 for p in paths)
    modes, _ = distinct_modes(MeasuredTarget(target, loc), paths, with_hessian=True)
    assert len(modes) == 1
    assert modes[0].log_mass == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(modes[0].loc, loc, rtol=1e-3, atol=1e-3)
