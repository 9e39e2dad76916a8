"""The contract of densities sees what it is there to see: one fault, one point that finds it."""

import math

import pyro.distributions as dist
import pytest
import torch
from densities import normal
from torch import nn

from pyro_flows_ext.distributions import Density, FlowDistribution
from pyro_flows_ext.testing import DENSITY_POINTS, ContractError, check_density_contract
from pyro_flows_ext.transforms import planar


class Sound(Density):
    """A normal with a learned location and a fixed scale."""

    def __init__(self):
        super().__init__(event_shape=torch.Size((2,)))
        self.loc = nn.Parameter(torch.zeros(2))
        self.base = normal(2)

    @property
    def support(self):
        return dist.constraints.real_vector

    def rsample(self, sample_shape=()):
        return self.loc + self.base.expand(self.batch_shape).rsample(torch.Size(sample_shape))

    def log_prob(self, value):
        batch = self._check_value(value)
        return self.base.log_prob(value - self.loc).expand(batch)


class WrongNormalizer(Sound):
    def log_prob(self, value):
        return super().log_prob(value) + 0.05


class WrongDraws(Sound):
    def rsample(self, sample_shape=()):
        return self.loc + 1.1 * (super().rsample(sample_shape) - self.loc)


class SharedRows(Sound):
    def rsample(self, sample_shape=()):
        draw = self.loc + self.base.rsample()
        return draw.expand(torch.Size(sample_shape) + self.batch_shape + self.event_shape)


class NoExpand(Sound):
    def expand(self, batch_shape, _instance=None):
        return dist.TorchDistribution.expand(self, batch_shape)  # not a module


class KnowsItsDraws(Sound):
    """Scores a value that it drew by what it remembers, and others wrongly."""

    def rsample(self, sample_shape=()):
        self.__dict__["_drawn"] = super().rsample(sample_shape)
        return self._drawn

    def log_prob(self, value):
        wrong = 0 if value is self.__dict__.get("_drawn") else 1e-3
        return super().log_prob(value) + wrong


class CutGradient(Sound):
    def log_prob(self, value):
        return self.base.log_prob(value - self.loc.detach()) + 0 * self.loc.sum()


class WrongGradient(Sound):
    def log_prob(self, value):
        score = super().log_prob(value)
        return score.detach() + 1.01 * (score - score.detach())


class OneScoreForAll(Sound):
    """One number for all rows together."""

    def log_prob(self, value):
        score = super().log_prob(value)
        return score.mean().expand(score.shape)


class NoScale(Sound):
    """Asks how many rows there are, and takes out the scale of a plate."""

    def log_prob(self, value):
        score = super().log_prob(value)
        return score * score.shape[-1] / 6 if score.dim() else score


class RememberedInState(Sound):
    """A buffer that use puts in."""

    def log_prob(self, value):
        self.register_buffer("last", value.detach().clone())
        return super().log_prob(value)


class StrayTensor(Sound):
    def log_prob(self, value):
        return super().log_prob(value - torch.zeros(2, dtype=value.dtype))


class FixedDtype(Sound):
    def log_prob(self, value):
        return super().log_prob(value).float()


class LooksAtValues(Sound):
    def log_prob(self, value):
        score = super().log_prob(value)
        return score if bool(score.sum() < 0) else score + 1e-3


class Bound(Sound):
    """log p minus |ε|: a bound whose reference is the sound density."""

    exact_log_prob = False
    offset = 0.0

    def log_prob(self, value):
        exact = super().log_prob(value)
        return exact - torch.randn_like(exact).abs() + self.offset


class NoBound(Bound):
    offset = 1.0  # above E |ε| = .8


class WorseWithMore(Bound):
    def log_prob_bound(self, value, num_particles):
        return self.log_prob(value) - 0.3 * math.log(num_particles)


FAULTS = {
    WrongNormalizer: 1,
    WrongDraws: 1,
    SharedRows: 2,
    NoExpand: 2,
    KnowsItsDraws: 3,
    CutGradient: 3,
    WrongGradient: 3,
    OneScoreForAll: 2,
    NoScale: 5,
    RememberedInState: 7,
    FixedDtype: 8,
    StrayTensor: 9,
    LooksAtValues: 10,
    NoBound: 4,
    WorseWithMore: 4,
}


def reference(density, x):
    return Sound.log_prob(density, x)


@pytest.mark.parametrize(
    ("fault", "number"), FAULTS.items(), ids=lambda v: getattr(v, "__name__", str(v))
)
def test_fault_is_found(fault, number):
    options = {"reference": reference} if issubclass(fault, Bound) else {}
    with pytest.raises(ContractError) as caught:
        DENSITY_POINTS[number](fault, **options)
    assert caught.value.number == number
    assert str(caught.value).startswith(f"point {number} (density: ")


def test_what_does_not_train_is_found():
    class Frozen(Sound):
        def log_prob(self, value):
            return super().log_prob(value) - 0 * self.loc.sum()

        def _check_value(self, value):
            self.loc.requires_grad_(False)
            return super()._check_value(value)

    with pytest.raises(ContractError, match=r"point 6 \(density: training\)"):
        DENSITY_POINTS[6](Frozen)


def test_the_sound_density_passes():
    check_density_contract(Sound)
    DENSITY_POINTS[4](Bound, reference=reference)


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    for number in (1, 2, 3, 5, 6, 7, 8):
        DENSITY_POINTS[number](lambda: FlowDistribution(normal(2), planar(2)))
    assert torch.equal(before, torch.get_rng_state())
