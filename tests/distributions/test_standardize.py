"""`standardize`: log-densities, draws and copies in the units of the data, of every density that supports it."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from densities import DENSITIES, normal

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import Density, Dequantized, FlowDistribution, NestedDropoutFlow
from pyro_flows_ext.testing import perturb

# Angles have units of their own.
NAMES = [
    name
    for name, entry in DENSITIES.items()
    if entry.context_dim is None and "standardized" not in name and name != "angles"
]


def made(name):
    density = perturb(DENSITIES[name].make().double(), scale=0.2).eval()
    event = density.event_shape
    loc = 1e3 * torch.randn(event, dtype=torch.float64)
    scale = 10 ** torch.empty(event, dtype=torch.float64).uniform_(-4, 4)
    return density, loc, scale


def seeded(function, *args):
    torch.manual_seed(1)
    return function(*args)


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_draws_are_those_of_the_layers_in_other_units(name):
    density, loc, scale = made(name)
    y = seeded(density.sample, (4,)).expand(4, *density.batch_shape, *density.event_shape)
    log_p = seeded(density.log_prob, y)
    objective = seeded(density.objective, y)
    density.standardize(loc, scale)
    x = seeded(density.sample, (4,))
    if density.has_rsample:
        torch.testing.assert_close(
            seeded(density.rsample, (4,)), x
        )  # convolutions round otherwise with a graph
    torch.testing.assert_close(x, loc + scale * y)
    shift = scale.log().sum()
    torch.testing.assert_close(seeded(density.log_prob, x), log_p - shift)
    torch.testing.assert_close(seeded(density.objective, x), objective - shift)
    if density.exact_log_prob:
        if density.has_rsample:
            value, score = seeded(density.rsample_and_log_prob, (4,))
            assert torch.equal(value, x)
            torch.testing.assert_close(score, log_p - shift)
    else:
        bound = seeded(density.log_prob_bound, x, 3)
        density.standardization = None
        torch.testing.assert_close(bound, seeded(density.log_prob_bound, y, 3) - shift)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_states_keep_the_units(name):
    density, loc, scale = made(name)
    density.standardize(loc, scale)
    x = density.sample((3,)).expand(3, *density.batch_shape, *density.event_shape)
    expected = seeded(density.log_prob, x)
    fresh = DENSITIES[name].make().double().eval()
    assert not [key for key in fresh.state_dict() if "standardization" in key]
    fresh.load_state_dict(density.state_dict())
    assert torch.equal(seeded(fresh.log_prob, x), expected)
    assert torch.equal(seeded(copy.deepcopy(density).log_prob, x), expected)
    if name not in ("flow-learned-base", "multi-scale"):
        assert torch.equal(seeded(pickle.loads(pickle.dumps(density)).log_prob, x), expected)
    names = [name for name, _ in density.named_parameters(remove_duplicate=False)]
    assert names == [name for name, _ in fresh.named_parameters(remove_duplicate=False)]
    assert not any("standardization" in name for name in names)


def test_conditional_density_and_its_condition():
    flow = FlowDistribution(normal(2), T.nsf(2, num_layers=2, hidden_dims=(8,), context_dim=1))
    perturb(flow, scale=0.3)
    context = torch.randn(5, 1)
    y = torch.randn(5, 2)
    expected = flow.condition(context).log_prob(y)
    loc, scale = torch.tensor([100.0, 0.0]), torch.tensor([10.0, 0.01])
    flow.standardize(loc, scale)
    found = flow.condition(context).log_prob(loc + scale * y)
    torch.testing.assert_close(found, expected - scale.log().sum(), atol=1e-3, rtol=1e-4)


def test_a_second_call_replaces_the_first():
    flow = FlowDistribution(normal(2), T.planar(2))
    x = torch.randn(4, 2)
    flow.standardize(torch.ones(2), 2 * torch.ones(2))
    assert not torch.equal(flow.log_prob(x), FlowDistribution(normal(2), T.planar(2)).log_prob(x))
    before = flow.log_prob(x)
    flow.standardize(torch.zeros(2), torch.ones(2))
    after = flow.log_prob(x)
    flow.standardization = None
    torch.testing.assert_close(after, flow.log_prob(x))
    assert not torch.allclose(before, after)


def test_reconstructions_are_measured_in_standardized_units():
    flow = NestedDropoutFlow(normal(2), T.LULinear(2)).double()
    y, k = torch.randn(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.int64)
    expected = flow.penalty(y, k)
    flow.standardize(torch.zeros(2), torch.full((2,), 1e8))
    torch.testing.assert_close(flow.penalty(1e8 * y, k), expected)
    torch.testing.assert_close(flow.reconstruct(1e8 * y, 2), 1e8 * y)


class Own(Density):
    def log_prob(self, value):
        return value.sum(-1)


def test_what_cannot_be_standardized():
    ones = torch.ones(2)
    with pytest.raises(TypeError, match="Own does not support it"):
        Own(event_shape=torch.Size([2])).standardize(ones, ones)
    inner = FlowDistribution(normal(2), T.planar(2))
    with pytest.raises(TypeError, match="Dequantized does not support it"):
        Dequantized(inner).standardize(ones, ones)
    bounded = FlowDistribution(dist.Normal(ones, 1.0).to_event(1), T.LogitPreprocess(0.05, 1).inv)
    with pytest.raises(ValueError, match="expected a density of all real numbers"):
        bounded.standardize(ones, ones)
    with pytest.raises(ValueError, match="scales above 0"):
        inner.standardize(ones, 0 * ones)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0, 2)], ids=str)
@pytest.mark.parametrize("name", ["flow-planar", "flow-standardized", "indexed-maf", "flow-vae"])
def test_no_rows_have_no_log_densities(name, shape):
    density = DENSITIES[name].make()
    assert density.log_prob(torch.zeros(shape)).shape == shape[:-1]


def test_angles_keep_their_units():
    density, loc, scale = made("angles")
    with pytest.raises(ValueError, match="expected a density of all real numbers"):
        density.standardize(loc, scale)
