"""Modes that a guide does not cover."""

import math

import pytest
import torch

from pyro_flows_ext.infer.refine import uncovered

POINTS = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 9.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.6, 0.395, 0.005], dtype=torch.float64)
# log p = log evidence + log weight + log N(u; point, I): the log joint at a mode is its log mass - log 2π.
LOG_MASS = -3.0 + WEIGHTS.log()
LOG_JOINT = LOG_MASS - math.log(2 * math.pi)


def mixture(weights):
    def log_prob(u):
        squares = (u.unsqueeze(-2) - POINTS).square().sum(-1)
        return (weights.log() - squares / 2 - math.log(2 * math.pi)).logsumexp(-1)

    return log_prob


def test_a_guide_that_is_the_posterior_covers_all():
    assert uncovered(POINTS, LOG_JOINT, LOG_MASS, mixture(WEIGHTS)) == []
    nearly = torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)
    assert uncovered(POINTS, LOG_JOINT, LOG_MASS, mixture(nearly)) == []


def test_a_mode_that_is_not_visited_is_named():
    [mode] = uncovered(POINTS, LOG_JOINT, LOG_MASS, mixture(torch.tensor([1.0, 0.0, 0.0]).double()))
    assert torch.equal(mode.point, POINTS[1])
    assert mode.share == pytest.approx(0.395)
    assert mode.deficit == pytest.approx(32 + math.log(0.395), abs=1e-6)
    assert "mu = 4, tau = 0 with some 39% of the mass" in mode.describe(["mu", "tau"])


def test_the_largest_comes_first_and_shares_below_the_limit_do_not_count():
    def nowhere(u):
        return torch.full((len(u),), -torch.inf)

    found = uncovered(POINTS, LOG_JOINT, LOG_MASS, nowhere)
    assert [round(m.share, 3) for m in found] == [0.6, 0.395]
    assert len(uncovered(POINTS, LOG_JOINT, LOG_MASS, nowhere, min_share=0.001)) == 3


def test_modes_without_a_mass_do_not_count():
    mass = LOG_MASS.clone()
    mass[1] = torch.nan
    guide = mixture(torch.tensor([1.0, 0.0, 0.0]).double())
    assert uncovered(POINTS, LOG_JOINT, mass, guide) == []
    assert uncovered(POINTS[:0], LOG_JOINT[:0], mass[:0], guide) == []


def test_wrong_shapes():
    with pytest.raises(ValueError, match="expected points"):
        uncovered(POINTS, LOG_JOINT[:2], LOG_MASS, mixture(WEIGHTS))
