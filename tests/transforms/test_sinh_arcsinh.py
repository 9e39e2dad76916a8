"""The sinh-arcsinh transform: the distribution of the paper, its tails, and values far out."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.special import log_ndtr

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import SinhArcsinh


def test_starts_as_the_identity():
    x = 5 * torch.randn(20, 3, dtype=torch.float64)
    y, ladj = SinhArcsinh(3).double().forward_and_ladj(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(ladj, torch.zeros(20, dtype=torch.float64))


def test_distribution_function_is_that_of_the_paper():
    """P(Y <= y) = Φ(sinh(δ arcsinh(y) - ε)), by the density summed up to y."""
    transform = perturb(SinhArcsinh(1).double())
    with torch.no_grad():
        delta = (-math.log(4) * (transform.log_tail / math.log(4)).tanh()).exp()
        epsilon = 3 * (transform.skewness / 3).tanh()
    zero = torch.zeros(1, dtype=torch.float64)
    density = dist.TransformedDistribution(dist.Normal(zero, 1.0).to_event(1), [transform])
    grid = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
    with torch.no_grad():
        cumulative = torch.cumulative_trapezoid(density.log_prob(grid.unsqueeze(-1)).exp(), grid)
    expected = log_ndtr((delta * grid[1:].asinh() - epsilon).sinh()).exp()
    torch.testing.assert_close(cumulative, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [-1e3, 1e3], ids=["lowest", "highest"])
def test_extreme_parameters_stay_finite_and_invertible(value, dtype):
    transform = SinhArcsinh(2).to(dtype)
    torch.nn.init.constant_(transform.skewness, value)
    torch.nn.init.constant_(transform.log_tail, value)
    x = torch.tensor([[-1e4, 1e4], [-3.0, 0.0]], dtype=dtype)
    y, ladj = transform.forward_and_ladj(x)
    assert y.isfinite().all()
    assert ladj.isfinite().all()
    back, inverse_ladj = transform.inverse_and_ladj(y)
    tolerance = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(back.asinh(), x.asinh(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=tolerance, atol=tolerance)


def test_tail_of_a_log_scale_is_reached():
    """With δ = 1/2 the tail is exponential: the log-density falls by 1/4 for each step of 1."""
    transform = SinhArcsinh(1).double()
    torch.nn.init.constant_(transform.log_tail, math.log(4) * math.atanh(math.log(2) / math.log(4)))
    zero = torch.zeros(1, dtype=torch.float64)
    density = dist.TransformedDistribution(dist.Normal(zero, 1.0).to_event(1), [transform])
    y = torch.tensor([[20.0], [30.0], [40.0]], dtype=torch.float64)
    drops = density.log_prob(y).diff()
    assert drops.tolist() == pytest.approx([-2.5, -2.5], rel=0.1)  # y = 2 x² far out
