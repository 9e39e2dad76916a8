"""What `pyro-flows density` is made of: its data, its densities and their scores."""

import math
from dataclasses import replace
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.cli.density.checkpoint import read_density, save_density
from pyro_flows_ext.cli.density.data import SOURCES, Split, load_rows, split_rows
from pyro_flows_ext.cli.density.flows import FLOWS, DensitySpec
from pyro_flows_ext.cli.density.pictures import _sheet
from pyro_flows_ext.cli.density.scores import SHRINKAGE, gaussian, score
from pyro_flows_ext.distributions import TOYS
from pyro_flows_ext.testing import perturb

NEEDS_SKLEARN = {"swiss-roll", "iris", "wine", "diabetes", "breast-cancer", "digits"}


def rows_of(num: int, dim: int = 2) -> torch.Tensor:
    """Correlated normals."""
    return torch.randn(num, dim) @ (torch.eye(dim) + 0.5 * torch.ones(dim, dim).tril(-1)) + 3


# --- data ---


@pytest.mark.parametrize("name", list(SOURCES))
def test_sets_by_name(name: str) -> None:
    if name in NEEDS_SKLEARN:
        pytest.importorskip("sklearn")
    rows = load_rows(name.replace("-", "_"), num_rows=30, seed=1)
    assert rows.values.isfinite().all()
    assert rows.values.shape[1] == len(rows.columns)
    assert torch.equal(rows.values, load_rows(name, num_rows=30, seed=1).values)
    if rows.num_levels is not None:
        assert rows.values.max() == rows.num_levels - 1
        assert math.prod(rows.image_shape) == rows.values.shape[1]
    if name in TOYS:
        assert len(rows.values) == 30
        assert rows.entropy == TOYS[name].entropy
        assert not torch.equal(rows.values, load_rows(name, num_rows=30, seed=2).values)


def test_the_split_is_one() -> None:
    values = torch.arange(205.0)[:, None]
    split = split_rows(values, seed=3)
    assert list(map(len, split)) == [165, 20, 20]
    assert sorted(torch.cat(split).flatten().tolist()) == values.flatten().tolist()
    assert torch.equal(split.test, split_rows(values, seed=3).test)
    assert not torch.equal(split.test, split_rows(values, seed=4).test)


# --- densities ---


@pytest.mark.parametrize("name", list(FLOWS))
def test_every_flow_is_saved_and_read(name: str, tmp_path: Path) -> None:
    kind = FLOWS[name]
    shape = (1, 4, 4) if kind.of_images else (3,)
    spec = DensitySpec(name, shape, None if kind.num_layers is None else 1)
    rows = 5 + 2 * torch.randn(64, *shape)
    density = perturb(spec.build(rows), scale=0.1).eval()
    save_density(tmp_path / "density.pt", "mine", ("a",), spec, density)
    saved = read_density(tmp_path / "density.pt")
    assert (saved.target, saved.columns) == ("mine", ("a",))
    results = []
    for one in (density, saved.density):
        torch.manual_seed(0)
        found = score(one, rows, 4)
        results.append(torch.cat([found.values, one.sample((6,)).flatten().double()]))
        assert found.kind == ("exact" if one.exact_log_prob else "bound")
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0].isfinite().all()
    assert len(results[0]) == 64 + 6 * math.prod(shape)


def test_the_gaussian_is_that_of_the_training_rows() -> None:
    values = rows_of(200, 3) * torch.tensor([1.0, 10.0, 0.1])
    split = split_rows(values, seed=0)
    covariance = torch.cov(split.train.T, correction=0)
    best = -math.inf
    for share in SHRINKAGE:
        mixed = torch.lerp(covariance, covariance.diagonal().diag(), share)
        expected = dist.MultivariateNormal(split.train.mean(0), mixed)
        value = expected.log_prob(split.validation).mean().item()
        if value > best:
            best, by_hand = value, expected.log_prob(split.test)
    found = score(gaussian(DensitySpec("nsf", (3,)), split), split.test, 1)
    torch.testing.assert_close(found.values, by_hand.double(), rtol=1e-4, atol=1e-4)


def test_the_gaussian_of_columns_that_add_up() -> None:
    values = rows_of(200, 2)
    values = torch.cat([values, values.sum(-1, keepdim=True)], -1)
    split = split_rows(values, seed=0)
    found = score(gaussian(DensitySpec("nsf", (3,)), split), split.test, 1)
    assert found.values.isfinite().all()


def test_probabilities_of_whole_numbers() -> None:
    """Against the mass of a normal between x and x + 1."""
    numbers = torch.randint(0, 2, (400, 1)).float()
    spec = DensitySpec("nsf", (1,), dequantize="uniform", num_levels=2)
    density = gaussian(spec, Split(numbers, numbers[:50], numbers[:50]))
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
    spec = DensitySpec("residual", (17,), 1)
    assert score(spec.build(rows), rows, 5).kind == "estimate"
    assert score(replace(spec, event_shape=(2,)).build(rows[:, :2]), rows[:, :2], 5).kind == "exact"
    whole = rows.abs().round().clamp(max=3)
    bound = score(replace(spec, dequantize="variational", num_levels=4).build(whole), whole, 5)
    assert (bound.kind, bound.num_particles) == ("bound", 1)


def test_a_sheet_of_images() -> None:
    images = torch.arange(24.0).reshape(6, 1, 2, 2)
    sheet = _sheet(images, fill=-1.0)
    assert sheet.shape == (5, 14, 1)
    assert sheet[:2, 3:5, 0].tolist() == [[4, 5], [6, 7]]
    assert sheet[3:, :2, 0].tolist() == [[20, 21], [22, 23]]
    assert (sheet[2] == -1).all()
    assert (sheet[3:, 2:] == -1).all()
