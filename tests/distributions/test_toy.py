import math

import pytest
import torch

from pyro_flows_ext.distributions import TOYS
from pyro_flows_ext.distributions.toy import LINE_WIDTH, RADIUS

# A box around everything but a share of 1e-6 of the mass, in units of which edges of sets fall on edges of cells.
BOXES = {
    "two-uniforms": (2, 1),
    "checkerboard": (4, 4),
    "annulus": (2, 2),
    "two-lines": (1 + LINE_WIDTH / 2, 1),
    "split-gaussian": (6, 6),
    "eight-gaussians": (6, 6),
    "moons": (2.2, 1.5),
    "crescent": (6, 20),
    "sine-wave": (6, 4),
    "abs": (6, 6),
    "sign": (6, 8),
}
SMOOTH = {"eight-gaussians", "moons", "crescent", "sine-wave"}
names = pytest.mark.parametrize("name", TOYS)


def resolution(name: str) -> int:
    """Of a grid that sees edges where they are; a multiple of 12."""
    return 240 if name in SMOOTH else 600


def cells(name: str, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints `(num, num, 2)` of the cells of the box, float64, and log p there."""
    axes = [(2 * (torch.arange(num) + 0.5) / num - 1).double() * half for half in BOXES[name]]
    grid = torch.cartesian_prod(*axes)
    log_p = torch.cat([TOYS[name].log_prob(part) for part in grid.split(20_000)])
    return grid.reshape(num, num, 2), log_p.reshape(num, num)


def cell_size(name: str, num: int) -> float:
    width, height = BOXES[name]
    return 4 * width * height / num**2


def test_every_box_is_of_a_toy():
    assert set(BOXES) == set(TOYS)


@names
def test_draws(name):
    toy = TOYS[name]
    x = toy.sample(1000)
    assert x.shape == (1000, 2)
    assert x.dtype == torch.get_default_dtype()
    assert len(x.unique(dim=0)) == 1000
    assert toy.sample(3, dtype=torch.float64).dtype == torch.float64
    width, height = BOXES[name]
    assert (x.abs() <= torch.tensor([width, height]) * 1.001).all()


@names
def test_seeds(name):
    toy = TOYS[name]
    torch.manual_seed(5)
    first = toy.sample(4)
    assert not torch.equal(first, toy.sample(4))
    torch.manual_seed(5)
    assert torch.equal(first, toy.sample(4))
    state = torch.get_rng_state()
    ours = toy.sample(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(ours, first)
    assert torch.equal(state, torch.get_rng_state())


@names
def test_density_integrates_to_one(name):
    num = resolution(name)
    _, log_p = cells(name, num)
    # Cells on a curved edge are in or out by their middle, and those on the lines 1/200 wide are three cells of 600.
    tolerance = {"annulus": 3e-3, "two-lines": 0.3}.get(name, 2e-3)
    assert (log_p.exp().sum() * cell_size(name, num)).item() == pytest.approx(1, abs=tolerance)


@names
def test_draws_have_that_density(name):
    """Counts in 12 x 12 boxes against the mass on a grid inside of each."""
    num, fine, n = 12, resolution(name), 40_000
    width, height = BOXES[name]
    x = TOYS[name].sample(n, dtype=torch.float64)
    counts = torch.histogramdd(x, num, range=[-width, width, -height, height]).hist / n
    _, log_p = cells(name, fine)
    mass = log_p.exp().reshape(num, fine // num, num, fine // num).sum((1, 3))
    mass = mass * cell_size(name, fine)
    if name == "two-lines":  # thinner than the grid: only what is along them
        counts, mass = counts.sum(0), mass.sum(0) / mass.sum()
    error = (mass * (1 - mass) / n).sqrt()
    assert ((counts - mass).abs() <= 5 * error + 1.5e-3).all()


@names
def test_entropy_is_that_of_draws(name):
    toy = TOYS[name]
    log_p = toy.log_prob(toy.sample(20_000, dtype=torch.float64))
    error = (log_p.std() / 20_000**0.5).item()
    assert -log_p.mean().item() == pytest.approx(toy.entropy, abs=5 * error + 1e-9)


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_entropy_by_quadrature(name):
    num = resolution(name)
    _, log_p = cells(name, num)
    mass = log_p.exp() * cell_size(name, num)
    assert -(mass * log_p).sum().item() == pytest.approx(toy_entropy(name), abs=2e-4)


def toy_entropy(name: str) -> float:
    entropy = TOYS[name].entropy
    assert entropy is not None
    return entropy


def test_floors_are_ordered_as_the_sets_are():
    """Half the width is log 2 less; eight apart normals would have log 8 more than one, and overlap a little."""
    apart = math.log(8) + 1 + math.log(2 * math.pi / 8)
    assert apart - 0.01 < toy_entropy("eight-gaussians") < apart
    assert toy_entropy("checkerboard") - toy_entropy("two-uniforms") == pytest.approx(math.log(8))
    assert toy_entropy("abs") == pytest.approx(toy_entropy("crescent") - 0.5)


def test_eight_gaussians_are_eight():
    x = TOYS["eight-gaussians"].sample(8000)
    corner = torch.round(torch.atan2(x[:, 1], x[:, 0]) * 4 / math.pi) % 8
    counts = torch.bincount(corner.long(), minlength=8)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()
    assert x.norm(dim=-1).mean().item() == pytest.approx(RADIUS, abs=0.05)


@names
def test_scores_outside_and_batches(name):
    toy = TOYS[name]
    x = toy.sample(6).reshape(2, 3, 2)
    assert toy.log_prob(x).shape == (2, 3)
    torch.testing.assert_close(toy.log_prob(x)[1, 2], toy.log_prob(x[1, 2]))
    assert toy.log_prob(torch.tensor([60.0, 60.0])).item() < -100
    with pytest.raises(ValueError, match=r"points of shape \(\*, 2\), got \(3,\)"):
        toy.log_prob(torch.zeros(3))
