"""`AnnealedELBO` and its schedules: what β multiplies, when it moves, and around which ELBOs."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from weighted_models import Given, X, local, local_guide, log_mean_exp, log_normal

from pyro_flows_ext.guides import AutoFlow
from pyro_flows_ext.infer import AnnealedELBO, ImportanceWeightedELBO, cosine, fit, linear, rezende

BETA = 0.3


def constant(step):
    return BETA


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (linear(4), {0: 0.0, 1: 0.25, 4: 1.0, 100: 1.0}),
        (linear(10, 0.5, 2.0), {0: 0.5, 5: 1.25, 10: 2.0, 11: 2.0}),
        (cosine(4), {0: 0.0, 1: (1 - 0.5**0.5) / 2, 2: 0.5, 4: 1.0, 9: 1.0}),
        (cosine(4, 0.2, 0.6), {0: 0.2, 2: 0.4, 4: 0.6}),
        (rezende(), {0: 0.01, 1: 0.0101, 5000: 0.51, 9900: 1.0, 20_000: 1.0}),
        (rezende(100), {0: 0.01, 50: 0.51, 99: 1.0, 100: 1.0}),
    ],
    ids=["linear", "linear-ends", "cosine", "cosine-ends", "rezende", "rezende-short"],
)
def test_schedules(schedule, values):
    for copy in (schedule, pickle.loads(pickle.dumps(schedule))):
        assert {step: copy(step) for step in values} == pytest.approx(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0), "num_steps: expected a positive integer, got 0"),
        (lambda: cosine(1.5), "num_steps"),
        (lambda: linear(3, -0.1), "start: expected a number from 0 on, got -0.1"),
        (lambda: linear(3, 0.0, math.inf), "end"),
        (lambda: rezende(start=-1.0), "start"),
    ],
    ids=["none", "fraction", "negative", "infinite", "rezende"],
)
def test_schedules_check_their_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def parts(z):
    """log p(x | z), log p(z) and log q(z) of `local` and `local_guide`, by particle and datum."""
    return log_normal(X, z), log_normal(z, 0.0), log_normal(z, 0.3 * X, 0.9)


def log_weights(z, term, beta=BETA):
    likelihood, prior, q = parts(z)
    return {
        "joint": beta * (likelihood + prior) - q,
        "likelihood": beta * likelihood + prior - q,
        "kl": likelihood + beta * (prior - q),
    }[term]


@pytest.mark.parametrize("term", ["joint", "likelihood", "kl"])
@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        TraceGraph_ELBO(),
        TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
        ImportanceWeightedELBO(),
    ],
    ids=lambda elbo: type(elbo).__name__,
)
def test_what_beta_multiplies(elbo, term):
    z = torch.randn(1, 6)
    annealed = AnnealedELBO(elbo, constant, term)
    value = -annealed.loss_and_grads(local, Given({"z": z}, None)(local_guide), X)
    assert value == pytest.approx(log_weights(z, term).sum().item(), rel=1e-5)


@pytest.mark.parametrize("term", ["likelihood", "kl"])
def test_an_analytic_kl(term):
    guide, loc = Given({"z": torch.zeros(1, 6)}, None)(local_guide), 0.3 * X
    value = -AnnealedELBO(TraceMeanField_ELBO(), constant, term).loss_and_grads(local, guide, X)
    kl = torch.distributions.kl_divergence(dist.Normal(loc, 0.9), dist.Normal(0.0, 1.0)).sum()
    likelihood = log_normal(X, torch.zeros(6)).sum()
    by_hand = BETA * likelihood - kl if term == "likelihood" else likelihood - BETA * kl
    assert value == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("size", [6, 2])
@pytest.mark.parametrize("term", ["joint", "likelihood", "kl"])
def test_beta_goes_inside_the_importance_weights(term, size):
    z, drawn = torch.randn(4, size), []

    def guide(x, size):
        with pyro.plate("data", len(x), subsample_size=size) as index:
            drawn.append(index)
            pyro.sample("z", dist.Normal(0.3 * x[index], 0.9))

    annealed = AnnealedELBO(ImportanceWeightedELBO(4, max_plate_nesting=1), constant, term)
    value = -annealed.loss_and_grads(local, Given({"z": z}, 1)(guide), X, size)
    all_z = torch.zeros(4, 6)
    all_z[:, drawn[0]] = z
    bound = log_mean_exp(log_weights(all_z, term))[drawn[0]].sum()
    assert value == pytest.approx((6 / size * bound).item(), rel=1e-5)


@pytest.mark.parametrize("term", ["joint", "likelihood", "kl"])
def test_beta_in_a_renyi_bound(term):
    values = {"z": torch.randn(3, 6)}
    annealed = AnnealedELBO(RenyiELBO(alpha=0.0, num_particles=3), constant, term)
    pyro.param("unused", torch.tensor(0.0))
    value = -annealed.loss_and_grads(local, Given(values, None)(local_guide), X)
    # Without a subsample and a common plate alone, its weights are by datum.
    assert value == pytest.approx(
        log_mean_exp(log_weights(values["z"], term)).sum().item(), rel=1e-5
    )


@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
@pytest.mark.parametrize("term", ["joint", "likelihood", "kl"])
def test_gradients_are_those_of_the_annealed_terms(monkeypatch, term, gradient):
    eps = torch.randn(4, 6)
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *_, **__: eps)

    def guide(x):
        with pyro.plate("data", 6):
            loc = pyro.param("loc", torch.tensor(0.4))
            pyro.sample("z", dist.Normal(loc, 0.9))

    elbo = ImportanceWeightedELBO(4, gradient, max_plate_nesting=1)
    AnnealedELBO(elbo, constant, term).loss_and_grads(local, guide, X)
    grad = pyro.get_param_store()._params["loc"].grad

    loc = torch.tensor(0.4, requires_grad=True)
    z = loc + 0.9 * eps
    q = log_normal(z, loc if gradient == "iwae" else loc.detach(), 0.9)
    log_w = log_weights(z, term) + (BETA if term == "kl" else 1) * (parts(z)[2] - q)
    w = log_w.detach().softmax(0) ** (2 if gradient == "dreg" else 1)
    (by_hand,) = torch.autograd.grad(-(w * log_w).sum(), loc)
    torch.testing.assert_close(grad, by_hand)


def test_steps_are_counted_by_loss_and_grads_alone():
    annealed = AnnealedELBO(Trace_ELBO(), linear(4))
    z = torch.randn(1, 6)

    def guide():
        return Given({"z": z}, None)(local_guide)

    for step in range(3):
        assert annealed.beta == step / 4
        value = annealed.loss_and_grads(local, guide(), X)
        assert -value == pytest.approx(log_weights(z, "joint", step / 4).sum().item(), rel=1e-5)
        # The loss is the bound itself, whatever the step.
        assert -annealed.loss(local, guide(), X) == pytest.approx(
            log_weights(z, "joint", 1.0).sum().item(), rel=1e-5
        )
        now = annealed.differentiable_loss(local, guide(), X).item()
        assert -now == pytest.approx(log_weights(z, "joint", (step + 1) / 4).sum().item(), rel=1e-5)
        assert annealed.steps == step + 1
    annealed.advance()
    assert annealed.beta == 1.0


def test_a_run_can_be_resumed():
    first = AnnealedELBO(Trace_ELBO(), linear(10))
    for _ in range(4):
        first.loss_and_grads(local, local_guide, X)
    second = AnnealedELBO(Trace_ELBO(), linear(10))
    second.load_state_dict(first.state_dict())
    third = pickle.loads(pickle.dumps(first))
    assert first.beta == second.beta == third.beta == 0.4


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def log_evidence(y):
    covariance = torch.eye(len(y)) + torch.ones(len(y), len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("elbo", "term"),
    [
        (Trace_ELBO(8, vectorize_particles=True), "joint"),
        (Trace_ELBO(8, vectorize_particles=True), "likelihood"),
        (ImportanceWeightedELBO(8, "dreg"), "kl"),
    ],
    ids=["joint", "likelihood", "importance-weighted-kl"],
)
def test_fit_ends_at_the_evidence(elbo, term):
    annealed = AnnealedELBO(elbo, linear(50, 0.1), term)
    options = {"num_steps": 120, "lr": 0.1, "warm_start": False, "progress": False}
    result = fit(conjugate, AutoFlow(conjugate, "planar"), X, loss=annealed, **options)
    assert annealed.steps == 120
    assert result.elbo == pytest.approx(log_evidence(X), abs=0.15)


def test_the_likelihood_term_anneals_from_the_prior():
    """At β = b the optimum is N(bΣy / (1 + bn), 1 / (1 + bn)): here b = 0, then 1."""
    annealed = AnnealedELBO(
        Trace_ELBO(16, vectorize_particles=True, max_plate_nesting=1),
        lambda step: float(step >= 150),
        "likelihood",
    )

    def guide(y):
        loc = pyro.param("loc", torch.tensor(1.0))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), annealed)
    for loc, scale in ((0.0, 1.0), (X.sum().item() / 7, 7**-0.5)):
        for _ in range(150):
            svi.step(X)
        assert pyro.param("loc").item() == pytest.approx(loc, abs=0.15)
        assert pyro.param("scale").item() == pytest.approx(scale, abs=0.15)
    assert svi.evaluate_loss(X) > -log_evidence(X) - 0.2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AnnealedELBO(1.0, constant), TypeError, "expected a pyro.infer.ELBO, got a float"),
        (lambda: AnnealedELBO(Trace_ELBO(), 0.5), TypeError, "schedule: expected a function"),
        (
            lambda: AnnealedELBO(Trace_ELBO(), constant, "prior"),
            ValueError,
            "term: expected one of joint, likelihood, kl; got 'prior'",
        ),
        (
            lambda: AnnealedELBO(JitTrace_ELBO(), constant),
            ValueError,
            "JitTrace_ELBO traces its loss once",
        ),
        (
            lambda: AnnealedELBO(TraceMeanField_ELBO(), constant, "joint"),
            ValueError,
            "TraceMeanField_ELBO has both in one analytic KL",
        ),
        (
            lambda: AnnealedELBO(Trace_ELBO(), lambda step: -1.0).beta,
            ValueError,
            "expected β >= 0 and finite, got -1.0 at step 0",
        ),
    ],
    ids=["elbo", "schedule", "term", "jit", "mean-field", "beta"],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
