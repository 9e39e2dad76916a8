"""`ImportanceWeightedELBO` in use: what it refuses, and training by it."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.effect import AutoNormalMessenger
from torch import nn
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

from pyro_flows_ext.guides import AutoFlow
from pyro_flows_ext.infer import ImportanceWeightedELBO, fit


def scaled_likelihood(x=X):
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def subsampled_items(x=G):
    """Groups with a latent, and items of which some are left out."""
    with pyro.plate("groups", 2, dim=-2):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3, subsample_size=2, dim=-1) as index:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[:, index])


def subsampled_items_guide(x=G):
    with pyro.plate("groups", 2, dim=-2):
        pyro.sample("m", dist.Normal(0.2, 1.1))


def coupled_subsample(x=X):
    with pyro.plate("data", 6, subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])
    pyro.factor("sum", -z.sum(-1, keepdim=True).square())


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "loop"])
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (subsampled, subsampled_guide, "plate 'data', which takes 2 of 6"),
        (subsampled_items, subsampled_items_guide, "plate 'items', which takes 2 of 3"),
        (coupled_subsample, lambda: local_guide(X, 2), "plate 'data', which takes 2 of 6"),
        (scaled_likelihood, lambda: local_guide(X), "'z' and 'x' have scales 1 and 0.5"),
    ],
    ids=["global-latent", "nested", "coupled", "scaled-likelihood"],
)
def test_where_no_bound_exists_it_says_so(model, guide, message, at_once):
    elbo = ImportanceWeightedELBO(2, vectorize_particles=at_once, max_plate_nesting=2)
    for method in (elbo.loss, elbo.loss_and_grads):
        with pytest.raises(ValueError, match=message):
            method(model, guide)
    assert math.isfinite(ImportanceWeightedELBO(1).loss(model, guide))


def test_a_scale_that_differs_within_a_datum_is_refused():
    def scaled(program):
        return poutine.scale(program, scale=torch.tensor([1.0, 2.0, 3.0]))

    elbo = ImportanceWeightedELBO(2, max_plate_nesting=2)
    with pytest.raises(ValueError, match=r"shape \(3,\) differs within a datum"):
        elbo.loss(scaled(nested), scaled(nested_guide))


def mixture(x=X):
    with pyro.plate("data", 6):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def mixture_guide(x=X):
    with pyro.plate("data", 6):
        pyro.sample("k", dist.Bernoulli(0.5))


def rejection_guide(x=X):
    with pyro.plate("data", 6):
        pyro.sample("z", dist.Normal(0.0, 1.0).has_rsample_(False))


def factor_guide(x=X):
    local_guide(x)
    pyro.factor("r", torch.tensor(0.0), has_rsample=False)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (mixture, mixture_guide, "latent 'k' .*discrete"),
        (mixture, config_enumerate(mixture_guide), "latent 'k' .*discrete"),
        (config_enumerate(mixture), lambda: None, "enumerated latent 'k' of the model is not in"),
        (lambda: local(X), lambda: None, "latent 'z' of the model is not in the guide"),
        (lambda: local(X), rejection_guide, "latent 'z' .*not reparameterised"),
        (lambda: local(X), factor_guide, "factor 'r' of the guide: expected .*has_rsample=True"),
    ],
    ids=["discrete", "enumerated", "model-enumerated", "missing", "score-function", "factor"],
)
@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
def test_latents_it_cannot_differentiate_are_refused(model, guide, message, gradient):
    for known in ({"max_plate_nesting": 1}, {}):
        elbo = ImportanceWeightedELBO(2, gradient, **known)
        for method in (elbo.loss, elbo.loss_and_grads):
            with pytest.raises(ValueError, match=message):
                method(model, guide)


def flat(x=X):
    """Adds over every dimension there is."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("all", -(x.sum() - mu.sum()).square())


def test_a_model_that_does_not_vectorise_is_refused_and_runs_in_a_loop():
    with pytest.raises(ValueError, match="vectorize_particles=False"):
        ImportanceWeightedELBO(3).loss(flat, subsampled_guide)
    values = {"mu": torch.randn(3)}
    elbo = ImportanceWeightedELBO(3, vectorize_particles=False)
    loss = elbo.loss(flat, Given(values, None)(subsampled_guide))
    log_w = -(X.sum() - values["mu"]).square() + log_normal(values["mu"], 0.0)
    log_w = log_w - log_normal(values["mu"], 0.1, 0.5)
    assert -loss == pytest.approx(log_mean_exp(log_w).item(), rel=1e-5)


def test_plates_are_found_at_the_first_call():
    elbo = ImportanceWeightedELBO(3)
    assert math.isfinite(elbo.loss(nested, nested_guide))
    assert elbo.max_plate_nesting == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles: expected a positive integer, got 0"),
        ({"num_particles": 1.5}, "num_particles"),
        ({"gradient": "vimco"}, "gradient: expected one of iwae, stl, dreg; got 'vimco'"),
    ],
    ids=["none", "fraction", "gradient"],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ImportanceWeightedELBO(**options)


def test_stl_warns_where_it_is_biased_and_only_there():
    with pytest.warns(UserWarning, match="biased for num_particles > 1"):
        ImportanceWeightedELBO(2, "stl")
    ImportanceWeightedELBO(1, "stl")


def conjugate(y):
    """mu ~ N(0, 1), y_n ~ N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def log_evidence(y):
    covariance = torch.eye(len(y)) + torch.ones(len(y), len(y))
    return dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y).item()


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
@pytest.mark.parametrize(
    "guide",
    [lambda m: AutoFlow(m, "planar"), AutoNormal, AutoMultivariateNormal],
    ids=["flow", "normal", "multivariate"],
)
def test_training_reaches_the_evidence(guide, gradient):
    loss = ImportanceWeightedELBO(8, gradient)
    options = {"num_steps": 250, "lr": 0.05, "warm_start": False, "progress": False}
    result = fit(conjugate, guide(conjugate), X, loss=loss, **options)
    assert result.losses[:10].mean() > result.losses[-25:].mean() + 0.5
    assert result.elbo == pytest.approx(log_evidence(X), abs=0.15)


@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
def test_svi_and_double_precision(gradient):
    x = X.double()
    guide = AutoFlow(conjugate, "sylvester")
    elbo = ImportanceWeightedELBO(8, gradient)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    losses = torch.tensor([svi.step(x) for _ in range(150)])
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert losses[-20:].mean() < losses[:5].mean() - 0.5
    assert svi.evaluate_loss(x) == pytest.approx(-log_evidence(X), abs=0.3)


@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
def test_as_a_module(gradient):
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(2.0))

        def forward(self, y):
            pyro.sample("mu", dist.Normal(self.loc, 7**-0.5))

    loss = ImportanceWeightedELBO(4, gradient)(conjugate, Guide())
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        value = loss(X)
        value.backward()
        optimizer.step()
    assert loss.guide.loc.item() == pytest.approx(X.sum().item() / 7, abs=0.1)
    assert value.item() == pytest.approx(-log_evidence(X), abs=0.4)


def test_a_guide_that_runs_inside_the_model():
    guide = AutoNormalMessenger(conjugate)
    guide(X)
    elbo = ImportanceWeightedELBO(4, vectorize_particles=False)
    assert elbo.loss(conjugate, guide, X) > -log_evidence(X) - 1
    with pytest.raises(ValueError, match="runs by itself, got the messenger AutoNormalMessenger"):
        ImportanceWeightedELBO(4, "dreg", vectorize_particles=False).loss_and_grads(
            conjugate, guide, X
        )


def test_it_can_be_pickled():
    elbo = pickle.loads(pickle.dumps(ImportanceWeightedELBO(3, "dreg", max_plate_nesting=1)))
    assert (elbo.num_particles, elbo.gradient, elbo.max_plate_nesting) == (3, "dreg", 2)
