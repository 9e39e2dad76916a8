"""Particles: densities against Pyro's own, one by one and together."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal

from pyro_flows_ext import flows
from pyro_flows_ext.guides import (
    AutoAmortizedFlow,
    AutoCIF,
    AutoFlow,
    AutoHamiltonian,
    AutoIAF,
    AutoMAF,
    AutoNSF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSylvester,
)
from pyro_flows_ext.programs import draw_particles, vectorization_error
from pyro_flows_ext.transforms import residual

Y = torch.tensor([[0.5, 1.5], [-0.2, 0.9], [0.1, 0.4]])


def nested(y=Y):
    """Two plates, an event dimension, and a factor."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 3, dim=-1):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, scale.unsqueeze(-1)).to_event(1), obs=y)
    pyro.factor("penalty", -mu.pow(2).sum(-1))


def flat_sum(y=Y):
    """Adds over every dimension there is: right for one particle, wrong for several, and silent about it."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("all", -(y.sum() - mu.sum()).pow(2))


def wrong_shape(y=Y):
    """Cannot broadcast a batch of particles."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("product", -(torch.eye(2) @ mu.reshape(2)).sum())


@pytest.mark.parametrize("model", [nested, flat_sum, wrong_shape], ids=lambda m: m.__name__)
def test_densities_are_those_of_a_single_trace(model):
    guide = AutoPlanar(model, 2)
    guide.setup(Y)
    with torch.no_grad():
        particles = draw_particles(model, guide, (Y,), num_samples=7, chunk_size=4)
    assert particles.log_weights.shape == (7,)
    torch.testing.assert_close(guide.log_prob(particles.samples), particles.log_guide)
    for i in range(7):
        values = {name: value[i] for name, value in particles.samples.items()}
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(Y)
        trace.compute_log_prob()
        torch.testing.assert_close(particles.log_joint[i], trace.log_prob_sum())
        for name, value in particles.log_likelihood.items():
            torch.testing.assert_close(value[i], trace.nodes[name]["log_prob"])
    assert set(particles.log_likelihood) == ({"y"} if model is nested else set())


@pytest.mark.parametrize(
    ("model", "reason"),
    [(flat_sum, "the log joint of a particle"), (wrong_shape, "the model raises RuntimeError")],
    ids=["silent", "loud"],
)
def test_models_that_do_not_vectorise_are_found_out(model, reason):
    guide = AutoPlanar(model, 1)
    guide.setup(Y)
    assert reason in vectorization_error(model, guide, (Y,))


def _list_of_guides(model):
    guide = AutoGuideList(model)
    guide.append(AutoNSF(poutine.block(model, hide=["mu"]), 1))
    guide.append(AutoNormal(poutine.block(model, expose=["mu"])))
    return guide


def _estimated_residual(model):
    # In training mode every log-det is a random estimate.
    return AutoFlow(model, lambda dim: residual(dim, num_layers=1))


GUIDES = [
    AutoCIF,
    AutoHamiltonian,
    AutoIAF,
    AutoMAF,
    AutoNSF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSylvester,
    _estimated_residual,
    _list_of_guides,
    AutoNormal,
    AutoMultivariateNormal,
    AutoDelta,
]


@pytest.mark.parametrize("make", GUIDES, ids=lambda make: make.__name__.strip("_"))
def test_guides_that_vectorise_pass(make):
    guide = make(nested)
    with torch.no_grad():
        guide(Y)
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert vectorization_error(nested, guide, (Y,)) is None
    assert guide.training


@pytest.mark.parametrize("subsample_size", [3, 2], ids=["all", "some"])
def test_an_amortized_guide_passes(subsample_size):
    def local(y):
        with pyro.plate("rows", 3, subsample_size=subsample_size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])

    encoder = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(), torch.nn.Linear(4, 4))
    guide = AutoAmortizedFlow(local, encoder)
    guide.setup(Y)
    assert vectorization_error(local, guide, (Y,)) is None


def sums_in_the_density(y=Y):
    """The scale's location is a sum over all there is."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 3, dim=-1):
        pyro.sample("scale", dist.LogNormal(mu.sum(), 1.0))


def sums_in_a_value(y=Y):
    """The densities are right, and one latent is a sum over all particles."""
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    noise = pyro.sample("noise", base, infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(noise + noise.sum(), event_dim=1))
    with pyro.plate("rows", 3, dim=-1):
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))


def reshapes(y=Y):
    """Cannot broadcast a batch of particles."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 3, dim=-1):
        pyro.sample("scale", dist.LogNormal(mu.reshape(2)[0], 1.0))


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (sums_in_the_density, "the guide's log density of a particle is"),
        (sums_in_a_value, "the guide draws another 'mu' for a particle alone"),
        (reshapes, "the guide raises RuntimeError"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_guides_that_do_not_vectorise_are_found_out(guide, reason):
    assert reason in vectorization_error(nested, guide, (Y,))
    # Then particles are drawn one by one, and right.
    particles = draw_particles(nested, guide, (Y,), num_samples=4)
    for i in range(4):
        values = {name: value[i] for name, value in particles.samples.items()}
        trace = poutine.trace(poutine.condition(nested, data=values)).get_trace(Y)
        torch.testing.assert_close(particles.log_joint[i], trace.log_prob_sum())


def test_scales_and_subsampled_likelihoods():
    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index, 0])

    guide = AutoPlanar(subsampled, 1)
    guide.setup(Y)
    assert vectorization_error(subsampled, guide, (Y,)) is None
    with pytest.raises(ValueError, match="plate 'rows' subsamples 2 of 3"):
        draw_particles(subsampled, guide, (Y,), num_samples=3)


def test_masked_data_and_deterministic_sites_have_no_likelihood():
    def masked(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * mu)
        with pyro.plate("rows", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[:, 0])

    guide = AutoPlanar(masked, 1)
    guide.setup(Y)
    particles = draw_particles(masked, guide, (Y,), num_samples=2)
    assert set(particles.log_likelihood) == {"y"}
    assert ((particles.log_likelihood["y"] != 0) == torch.tensor([True, False, True])).all()


def test_nan_arguments_are_named_before_the_guide_is_called():
    guide = AutoNormal(nested)
    with pytest.raises(ValueError, match=r"^y: 1 of 6 values is NaN, the first in row 2 "):
        draw_particles(nested, guide, (torch.where(Y == 0.1, torch.nan, Y),), num_samples=3)
    assert guide.prototype_trace is None


def test_a_latent_of_the_guide_alone_is_refused():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("mu", dist.Normal(0.5, 1.0))
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="latent 'extra' of the guide is not in the model"):
        draw_particles(model, guide, num_samples=10)


def test_a_bound_is_refused_as_a_site_of_the_guide():
    density = flows.CIF(2)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.sample("z", density)

    with pytest.raises(ValueError, match="expected an exact log_prob, got a lower bound"):
        draw_particles(model, guide, num_samples=10)
