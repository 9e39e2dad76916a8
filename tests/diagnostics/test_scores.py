"""Scores of densities beside those of a Gaussian, and pictures of images."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.diagnostics.plots_density import _sheet
from pyro_flows_ext.diagnostics.scores import SHRINKAGE, gaussian, score
from pyro_flows_ext.distributions import Dequantized
from pyro_flows_ext.flows import Residual


def rows_of(num: int, dim: int = 2) -> torch.Tensor:
    """Correlated normals."""
    return torch.randn(num, dim) @ (torch.eye(dim) + 0.5 * torch.ones(dim, dim).tril(-1)) + 3


def split_of(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows to train, to stop and to test."""
    return values[40:], values[:20], values[20:40]


def test_the_gaussian_is_that_of_the_training_rows() -> None:
    values = rows_of(200, 3) * torch.tensor([1.0, 10.0, 0.1])
    train, validation, test = split_of(values)
    covariance = torch.cov(train.T, correction=0)
    best = -math.inf
    for share in SHRINKAGE:
        mixed = torch.lerp(covariance, covariance.diagonal().diag(), share)
        expected = dist.MultivariateNormal(train.mean(0), mixed)
        value = expected.log_prob(validation).mean().item()
        if value > best:
            best, by_hand = value, expected.log_prob(test)
    found = score(gaussian(train, validation), test, 1)
    torch.testing.assert_close(found.values, by_hand.double(), rtol=1e-4, atol=1e-4)


def test_the_gaussian_of_columns_that_add_up() -> None:
    values = rows_of(200, 2)
    values = torch.cat([values, values.sum(-1, keepdim=True)], -1)
    train, validation, test = split_of(values)
    found = score(gaussian(train, validation), test, 1)
    assert found.values.isfinite().all()


def test_probabilities_of_whole_numbers() -> None:
    """Against the mass of a normal between x and x + 1."""
    numbers = torch.randint(0, 2, (400, 1)).float()
    density = gaussian(numbers, numbers[:50], num_levels=2)
    moments, whitening = density.flow.standardization, density.flow.transform
    exact = dist.Normal(
        2 * (moments.loc + moments.scale * whitening.loc),
        2 * moments.scale * whitening.scale_tril[0],
    )
    assert exact.mean.item() == pytest.approx(numbers.mean().item() + 0.5, abs=0.05)
    assert exact.variance.item() == pytest.approx(numbers.var().item() + 1 / 12, abs=0.04)
    x = torch.arange(2.0)[:, None]
    found = score(density, x, 20_000)
    assert found.kind == "bound"
    expected = (exact.cdf(x + 1) - exact.cdf(x)).log().flatten()
    torch.testing.assert_close(found.values.float(), expected, rtol=0, atol=0.01)


def test_estimates_are_called_so() -> None:
    rows = torch.randn(8, 17)
    density = Residual(17, num_layers=1)
    assert score(density, rows, 5).kind == "estimate"
    assert score(Residual(2, num_layers=1), rows[:, :2], 5).kind == "exact"
    whole = rows.abs().round().clamp(max=3)
    bound = score(Dequantized(density, "variational", num_levels=4), whole, 5)
    assert (bound.kind, bound.num_particles) == ("bound", 1)


def test_a_sheet_of_images() -> None:
    images = torch.arange(24.0).reshape(6, 1, 2, 2)
    sheet = _sheet(images, fill=-1.0)
    assert sheet.shape == (5, 14, 1)
    assert sheet[:2, 3:5, 0].tolist() == [[4, 5], [6, 7]]
    assert sheet[3:, :2, 0].tolist() == [[20, 21], [22, 23]]
    assert (sheet[2] == -1).all()
    assert (sheet[3:, 2:] == -1).all()
