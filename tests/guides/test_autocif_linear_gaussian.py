"""Continuously indexed layers on x = A u + b + .1 ε in the plane, whose log p(x) is known: E log p(x) = -1.9522."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cif_models import raw_of
from pyro.infer.autoguide.initialization import init_to_value

from pyro_flows_ext.guides import AutoCIF
from pyro_flows_ext.infer import ImportanceWeightedELBO
from pyro_flows_ext.transforms import ElementwiseAffine, IndexedTransform

A, B, SD = torch.tensor([-4.0, 1.0]), torch.tensor([1.0, -3.0]), 0.1
OPTIMUM = -1.9522  # E log p(x); with no index, and so no correlation, -4.26
NUM_PARTICLES = (1, 10, 100)


def law(dtype):
    a = A.to(dtype)
    return dist.MultivariateNormal(B.to(dtype), a.outer(a) + SD**2 * torch.eye(2, dtype=dtype))


TRUTH, EXACT = law(torch.float32), law(torch.float64)


def errors_of(elbo, density, index, truth, batches=25, size=400):
    """Of the bound, a datum: bound - log p(x), in means over `batches` batches."""
    x = truth.sample((batches, size))
    bounds = torch.tensor([-elbo.loss(density, index, batch) for batch in x], dtype=x.dtype)
    return (bounds - truth.log_prob(x).sum(-1)) / size


def model():
    """The distribution of the data as that of a latent, for a guide that is trained on data instead."""
    pyro.sample("x", TRUTH)


@pytest.fixture(scope="module")
def trained():
    """One layer around an elementwise map, which correlates nothing but through u, by maximum likelihood.

    Each of 300 steps has 200 fresh data and 10 particles, at a rate that falls from .03 to 0.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    start = init_to_value(values={"x": torch.zeros(2)})
    guide = AutoCIF(model, 1, ElementwiseAffine, init_scale=1.0, init_loc_fn=start)
    guide.setup()
    steps = 300
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-guide.log_prob_bound({"x": TRUTH.sample((200,))}, 10).mean()).backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return guide.requires_grad_(False)


def check_bounds(differences):
    """Of bound - log p(x) at each of `NUM_PARTICLES`, `(N)`: below 0, rising, and near 0 in the end; means, errors."""
    means = [OPTIMUM + d.mean().item() for d in differences]
    errors = [d.std().item() / len(d) ** 0.5 for d in differences]
    for i, (mean, error) in enumerate(zip(means, errors, strict=True)):
        assert mean < OPTIMUM + 4 * error
        assert i == 0 or mean > means[i - 1] - 4 * math.hypot(error, errors[i - 1])
    assert means[-1] > means[0] + 4 * math.hypot(errors[0], errors[-1])
    assert means[0] > OPTIMUM - 0.25
    assert means[-1] > OPTIMUM - 0.08
    return means, errors


def test_the_optimum():
    assert -TRUTH.entropy().item() == pytest.approx(OPTIMUM, abs=5e-5)


@pytest.mark.slow
def test_trained_by_maximum_likelihood(trained):
    pyro.set_rng_seed(1)
    differences = []
    for k in NUM_PARTICLES:
        x = TRUTH.sample((10_000,))
        differences.append(trained.log_prob_bound({"x": x}, k) - TRUTH.log_prob(x))
    check_bounds(differences)


def test_as_model_and_guide_of_the_index(trained):
    """p(x, u) is the model and r(u | x) the guide: each datum has weights of its own."""
    joint, (layer,) = trained.get_posterior(), trained.transform.layers
    c = math.log(1000)

    def density(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(1), 1.0).to_event(1).mask(False))
            pyro.factor("x", joint.log_prob(torch.cat([x.expand(*u.shape[:-1], 2), u], -1)))

    def reverse(x):
        a = layer.indexed.transform.inv(trained.transform.placement.inv(x))
        loc, raw = layer.reverse_net(a).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(loc, (c * (raw / c).tanh()).exp()).to_event(1))

    pyro.set_rng_seed(2)
    elbos = [ImportanceWeightedELBO(k, max_plate_nesting=1) for k in NUM_PARTICLES]
    means, errors = check_bounds([errors_of(elbo, density, reverse, TRUTH) for elbo in elbos])
    for k, mean, error in zip(NUM_PARTICLES, means, errors, strict=True):
        x = TRUTH.sample((10_000,))
        same = trained.log_prob_bound({"x": x}, k) - TRUTH.log_prob(x)
        assert OPTIMUM + same.mean().item() == pytest.approx(
            mean, abs=4 * math.hypot(error, same.std().item() / 100)
        )


# --- F(ε; u) = .1 ε + A u + b, and q(u | x) the posterior of u or off it ---


def exact_program(shift, widen):
    """Model and guide of u ~ N(0, 1), x = F(ε; u); q(u | x) moved by `shift` posterior sds, `widen` times as wide."""
    layer = IndexedTransform(ElementwiseAffine(2), 1, hidden_dims=()).double()
    a, b = A.double(), B.double()
    log_scale = torch.full((2,), math.log(SD), dtype=torch.float64)
    with torch.no_grad():
        layer.net[0].weight.zero_()
        layer.net[0].weight[:2, 0] = a
        layer.net[0].bias.copy_(torch.cat([b, raw_of(log_scale)]))
    precision = 1 + a @ a / SD**2

    def density(x):
        base = dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(1, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.TransformedDistribution(base, [layer.condition(u)]), obs=x)

    def index(x):
        loc = ((x - b) @ a / SD**2 / precision)[:, None] + shift / precision.sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(loc, widen / precision.sqrt()).to_event(1))

    return density, index


@pytest.mark.parametrize("num_particles", NUM_PARTICLES)
def test_the_exact_index_leaves_no_gap(num_particles):
    elbo = ImportanceWeightedELBO(num_particles, max_plate_nesting=1)
    gap = errors_of(elbo, *exact_program(0.0, 1.0), EXACT, batches=3)
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0.0, atol=1e-9)


def test_the_gap_of_an_inexact_index_is_a_divergence():
    """At K = 1 it is KL(q(u | x) ‖ p(u | x)), the same for every x; the bound closes it as K grows."""
    shift, widen = 0.8, 1.5
    divergence = 0.5 * (widen**2 + shift**2 - 1) - math.log(widen)
    means, errors = [], []
    for k in NUM_PARTICLES:
        elbo = ImportanceWeightedELBO(k, max_plate_nesting=1)
        gap = errors_of(elbo, *exact_program(shift, widen), EXACT)
        means.append(gap.mean().item())
        errors.append(gap.std().item() / len(gap) ** 0.5)
    assert means[0] == pytest.approx(-divergence, abs=4 * errors[0])
    assert errors[0] < 0.02 * divergence
    assert means[0] < 5 * means[1] < 25 * means[2] < 100 * errors[2]
