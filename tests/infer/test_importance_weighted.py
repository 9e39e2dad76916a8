"""`ImportanceWeightedELBO`: its values, against weights added up by hand, closed forms and Pyro's ELBO."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from weighted_models import (
    G,
    Given,
    X,
    local,
    local_guide,
    log_mean_exp,
    log_normal,
    nested,
    nested_guide,
    subsampled,
    subsampled_guide,
)

from pyro_flows_ext.infer import ImportanceWeightedELBO


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "loop"])
@pytest.mark.parametrize("size", [6, 3, 1])
@pytest.mark.parametrize("num_particles", [1, 5])
def test_a_subsample_is_scaled_outside_of_the_logarithm(size, num_particles, at_once):
    drawn = []

    def guide(x, size):
        with pyro.plate("data", len(x), subsample_size=size) as index:
            drawn.append((index, pyro.sample("z", dist.Normal(0.3 * x[index], 0.9))))

    elbo = ImportanceWeightedELBO(num_particles, vectorize_particles=at_once, max_plate_nesting=1)
    loss = elbo.loss(local, guide, X, size)
    index = drawn[0][0]
    assert all(torch.equal(index, other) for other, _ in drawn)  # one subsample for all particles
    assert len(index.unique()) == size
    x, z = X[index], torch.stack([z for _, z in drawn]).reshape(num_particles, size)
    log_w = log_normal(z, 0.0) + log_normal(x, z) - log_normal(z, 0.3 * x, 0.9)
    assert -loss == pytest.approx(6 / size * log_mean_exp(log_w).sum().item(), rel=1e-5)


def test_bounds_of_one_particle_are_the_elbo_whatever_the_scales():
    elbo = ImportanceWeightedELBO(1, num_bounds=5)
    pyros = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    with pyro.validation_enabled(False):  # the runs that find the plates would take draws
        elbo.loss(subsampled, subsampled_guide)
        losses = []
        for loss in (elbo.loss, pyros.loss):
            pyro.set_rng_seed(0)
            losses.append(loss(subsampled, subsampled_guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_lower_bound_that_rises_to_the_evidence():
    x = X.repeat(50)
    evidence = log_normal(x, 0.0, 2**0.5).sum().item()
    means, errors = [], []
    for num_particles in (1, 2, 5, 20, 100):
        elbo = ImportanceWeightedELBO(num_particles, max_plate_nesting=1)
        bounds = -torch.tensor([elbo.loss(local, local_guide, x, 150) for _ in range(60)])
        means.append(bounds.mean().item())
        errors.append(bounds.std().item() / 60**0.5)
    for i, mean in enumerate(means):
        assert mean < evidence + 4 * errors[i]
        assert i == 0 or mean > means[i - 1] - 4 * math.hypot(errors[i], errors[i - 1])
    gaps = [evidence - mean for mean in means]
    assert gaps[0] > 10 * errors[0]
    assert gaps[-1] < 0.1 * gaps[0]


def nested_bound(m, z):
    log_w = log_normal(m, 0.0) - log_normal(m, 0.2, 1.1)
    log_w = log_w + (log_normal(z, m) + log_normal(G, z) - log_normal(z, m, 0.7)).sum(-1, True)
    return log_mean_exp(log_w).sum()


def several(x=X):
    """Two local latents, a mask, a deterministic site, and data outside of the plate."""
    pyro.sample("outside", dist.Normal(0.4, 1.0), obs=torch.tensor(1.0))
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(z, 1.0))
        pyro.deterministic("sum", z + v)
        with poutine.mask(mask=x > 0):
            pyro.sample("x", dist.Normal(v, 1.0), obs=x)


def several_guide(x=X):
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(0.1, 1.2))
        pyro.sample("v", dist.Normal(0.5 * z, 0.8))


def several_bound(z, v):
    log_w = log_normal(z, 0.0) + log_normal(v, z) + (X > 0) * log_normal(X, v)
    log_w = log_w - log_normal(z, 0.1, 1.2) - log_normal(v, 0.5 * z, 0.8)
    return log_mean_exp(log_w).sum() + log_normal(1.0, 0.4)


def auxiliary_guide(x=X):
    """u is auxiliary, with the reverse model r(u | z) as a factor."""
    with pyro.plate("data", 6):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        z = pyro.sample("z", dist.Normal(0.5 * u, 0.8))
        pyro.factor("r", -dist.Normal(0.4 * z, 0.9).log_prob(u), has_rsample=True)


def auxiliary_bound(u, z):
    log_w = log_normal(z, 0.0) + log_normal(X, z)
    log_w = log_w - log_normal(u, 0.0) - log_normal(z, 0.5 * u, 0.8) + log_normal(u, 0.4 * z, 0.9)
    return log_mean_exp(log_w).sum()


def loop(x=X):
    for i in pyro.plate("data", 6):
        z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])


def loop_guide(x=X):
    for i in pyro.plate("data", 6):
        pyro.sample(f"z{i}", dist.Normal(0.3 * x[i], 0.9))


def loop_bound(**z):
    z = torch.stack([z[f"z{i}"] for i in range(6)], -1)
    log_w = log_normal(z, 0.0) + log_normal(X, z) - log_normal(z, 0.3 * X, 0.9)
    return log_mean_exp(log_w).sum()


def shared(x=X):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_guide(x=X):
    mu = pyro.sample("mu", dist.Normal(0.1, 1.1))
    with pyro.plate("data", 6):
        pyro.sample("z", dist.Normal(mu, 0.7))


def shared_bound(mu, z):
    mu = mu.unsqueeze(-1)
    log_w = log_normal(mu, 0.0) - log_normal(mu, 0.1, 1.1)
    log_w = log_w + (log_normal(z, mu) + log_normal(X, z) - log_normal(z, mu, 0.7)).sum(-1, True)
    return log_mean_exp(log_w).sum()


def point_guide(x=X):
    """The global latent at a point: the local ones still have weights of their own."""
    mu = pyro.sample("mu", dist.Delta(torch.tensor(0.6)))
    with pyro.plate("data", 6):
        pyro.sample("z", dist.Normal(mu, 0.7))


def point_bound(z):
    log_w = log_normal(z, 0.6) + log_normal(X, z) - log_normal(z, 0.6, 0.7)
    return log_mean_exp(log_w).sum() + log_normal(0.6, 0.0)


def total(x=X):
    """An observation that depends on all local latents: there is one weight."""
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("sum", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x.sum())


def total_bound(z):
    log_w = log_normal(z, 0.0).sum(-1) + log_normal(X.sum(), z.sum(-1))
    return log_mean_exp(log_w - log_normal(z, 0.3 * X, 0.9).sum(-1))


CASES = {
    "nested": (nested, nested_guide, {"m": (2, 1), "z": (2, 3)}, nested_bound),
    "several": (several, several_guide, {"z": (6,), "v": (6,)}, several_bound),
    "auxiliary": (
        lambda: local(X),
        auxiliary_guide,
        {"u": (6,), "z": (6,)},
        auxiliary_bound,
    ),
    "sequential": (loop, loop_guide, {f"z{i}": () for i in range(6)}, loop_bound),
    "global": (shared, shared_guide, {"mu": (), "z": (6,)}, shared_bound),
    "point": (shared, point_guide, {"z": (6,)}, point_bound),
    "coupled": (total, lambda: local_guide(X), {"z": (6,)}, total_bound),
}


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_weights_by_hand(case, at_once):
    model, guide, shapes, bound = CASES[case]
    values = {name: torch.randn(4, *shape) for name, shape in shapes.items()}
    for num_particles in (1, 4):
        some = {name: value[:num_particles] for name, value in values.items()}
        elbo = ImportanceWeightedELBO(
            num_particles, vectorize_particles=at_once, max_plate_nesting=2
        )
        given = Given(some, 2 if at_once and num_particles > 1 else None)
        assert -elbo.loss(model, given(guide)) == pytest.approx(bound(**some).item(), rel=1e-5)


@pytest.mark.parametrize("case", ["nested", "several", "auxiliary", "global", "point"])
def test_one_particle_is_the_elbo(case):
    model, guide, *_ = CASES[case]
    losses = []
    for elbo in (ImportanceWeightedELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_one_particle_takes_any_scale():
    losses = []
    for elbo in (ImportanceWeightedELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        model = poutine.scale(subsampled, scale=0.3)
        losses.append(elbo.loss(model, subsampled_guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    "scale",
    [0.1, torch.tensor(2.0), torch.arange(1.0, 7.0)],
    ids=["number", "tensor", "by-datum"],
)
def test_a_common_scale_stays_outside(scale):
    def scaled(program):
        def run(x):
            with poutine.scale(scale=scale):
                program(x)

        return run

    z = torch.randn(3, 6)
    elbo = ImportanceWeightedELBO(3, max_plate_nesting=1)
    loss = elbo.loss(scaled(local), Given({"z": z}, 1)(scaled(local_guide)), X)
    log_w = log_normal(z, 0.0) + log_normal(X, z) - log_normal(z, 0.3 * X, 0.9)
    assert -loss == pytest.approx((scale * log_mean_exp(log_w)).sum().item(), rel=1e-5)
