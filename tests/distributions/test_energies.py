import math

import pytest
import torch

from pyro_flows_ext.distributions.energies import ENERGIES


def grid(limit_1: float, limit_2: float, step: float) -> torch.Tensor:
    """Midpoints of the cells of [-limit_1, limit_1] x [-limit_2, limit_2], float64."""
    axes = [
        torch.arange(-limit + step / 2, limit, step, dtype=torch.float64)
        for limit in (limit_1, limit_2)
    ]
    return torch.cartesian_prod(*axes)


@pytest.mark.parametrize("name", list(ENERGIES))
def test_log_z_is_the_integral(name: str) -> None:
    energy, step = ENERGIES[name], 0.02
    # Both ridges of U3 and U4 and the ring of U1 lie within |z2| <= 4 plus several widths.
    z = grid(min(energy.z1_limit, 6.0), 7.0, step)
    log_z = (-energy(z)).logsumexp(0) + 2 * math.log(step)
    assert log_z.item() == pytest.approx(energy.log_z, abs=6e-5)


def naive(name: str, x: float, y: float) -> float:
    """The formulas of the table, term by term."""

    def bump(value: float, scale: float) -> float:
        return math.exp(-0.5 * (value / scale) ** 2)

    w1 = math.sin(2 * math.pi * x / 4)
    w2 = 3 * math.exp(-0.5 * ((x - 1) / 0.6) ** 2)
    w3 = 3 / (1 + math.exp(-(x - 1) / 0.3))
    if name == "u1":
        ring = 0.5 * ((math.hypot(x, y) - 2) / 0.4) ** 2
        return ring - math.log(bump(x - 2, 0.6) + bump(x + 2, 0.6))
    if name == "u2":
        return 0.5 * ((y - w1) / 0.4) ** 2
    if name == "u3":
        return -math.log(bump(y - w1, 0.35) + bump(y - w1 + w2, 0.35))
    return -math.log(bump(y - w1, 0.4) + bump(y - w1 + w3, 0.35))


@pytest.mark.parametrize("name", list(ENERGIES))
@pytest.mark.parametrize("point", [(0.3, -0.2), (1.0, 1.1), (-2.1, 0.4), (2.5, -1.7)], ids=str)
def test_formula(name: str, point: tuple[float, float]) -> None:
    got = ENERGIES[name](torch.tensor(point, dtype=torch.float64))
    assert got.item() == pytest.approx(naive(name, *point), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list(ENERGIES))
def test_finite_far_away_and_at_the_origin(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor(
        [[0.0, 0.0], [1e3, -1e3], [-1e3, 1e3], [0.0, 50.0]], dtype=dtype, requires_grad=True
    )
    energy = ENERGIES[name](z)
    (gradient,) = torch.autograd.grad(energy.sum(), z)
    assert energy.dtype == dtype
    assert energy.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", list(ENERGIES))
def test_batch_shapes(name: str) -> None:
    z = torch.randn(3, 4, 2)
    together = ENERGIES[name](z)
    assert together.shape == (3, 4)
    torch.testing.assert_close(together[1, 2], ENERGIES[name](z[1, 2]))


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)], ids=str)
@pytest.mark.parametrize("name", list(ENERGIES))
def test_wrong_shape(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected points of shape \(\*, 2\)"):
        ENERGIES[name](torch.zeros(shape))
