"""`AutoAmortizedFlow(flow="cif")`: every ELBO is a bound, weights go by datum, and a datum may have several modes."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_models import (
    CIF,
    NOISE,
    W,
    closed_form,
    encoder,
    linear,
    perturbed,
    several,
    simulate,
    terms,
)
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.infer import ImportanceWeightedELBO, fit


def log_weights(guide, x, num, **kwargs):
    """log w of `num` particles of every datum of `linear`: `(num, N)`."""
    particles = pyro.plate("num_particles_vectorized", num, dim=-2)
    trace = poutine.trace(particles(guide)).get_trace(x, **kwargs)
    log_q, log_r = terms(trace)
    z, rows = trace.nodes["z"]["value"], x[trace.nodes["data"]["value"]]
    log_joint = dist.Normal(z @ W.to(x).mT, NOISE).log_prob(rows).sum(-1)
    return log_joint + dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_r - log_q


@pytest.fixture(scope="module")
def trained():
    """A guide for `linear` after 40 steps, and after 160."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, guides = simulate(30), []
    guide = AutoAmortizedFlow(linear, encoder(), **CIF, init_scale=0.5)
    options = {"lr": 0.03, "num_particles": 8, "progress": False, "seed": 0}
    for steps in (40, 120):
        fit(linear, guide, x, size=15, num_steps=steps, **options)
        guides.append(copy.deepcopy(guide))
    return x, guides


@pytest.mark.slow
@torch.no_grad()
def test_the_bound_of_a_linear_gaussian_model_nearly_reaches_the_evidence(trained):
    x, guides = trained
    mean, sd, evidence = closed_form(x)
    log_w = log_weights(guides[-1], x, 4000)
    error = log_w.std(0) / 4000**0.5
    assert (log_w.mean(0) < evidence + 4 * error).all()
    assert (evidence - log_w.mean(0)).mean() < 0.05
    draws = guides[-1].sample_posterior(4000, x)["z"]
    assert ((draws.mean(0) - mean).abs() / sd).mean() < 0.15
    assert (draws.std(0) / sd - 1).abs().mean() < 0.15
    weighed = importance(guides[-1], linear, x[:5], num_samples=2000)
    assert weighed.log_evidence == pytest.approx(evidence[:5].sum().item(), abs=0.1)


@torch.no_grad()
def test_the_bound_of_every_datum_rises_with_the_particles_to_the_evidence(trained):
    x, guides = trained
    evidence = closed_form(x)[2]
    log_w = log_weights(guides[0], x, 8000)
    means, errors = [], []
    for k in (1, 5, 50):
        bounds = log_w.reshape(-1, k, len(x)).logsumexp(1) - math.log(k)
        means.append(bounds.mean(0))
        errors.append(bounds.std(0) / len(bounds) ** 0.5)
        assert (means[-1] < evidence + 4 * errors[-1]).all()
    gaps = [(evidence - mean).mean() for mean in means]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[0] > 0.05
    for i in (1, 2):
        assert (means[i] > means[i - 1] - 4 * torch.hypot(errors[i], errors[i - 1])).all()


@pytest.mark.parametrize("kwargs", [{}, {"size": 3}, {"index": torch.tensor([4, 1, 2])}], ids=str)
@pytest.mark.parametrize("gradient", ["iwae", "dreg"])
def test_importance_weights_go_by_datum(kwargs, gradient):
    x = simulate(6, torch.float64)
    guide = perturbed(linear, x, **CIF)
    guide(x, **kwargs)  # for new shapes the model runs more often, and draws
    elbo = ImportanceWeightedELBO(4, gradient, max_plate_nesting=1)
    pyro.set_rng_seed(5)
    loss = elbo.loss(linear, guide, x, **kwargs)
    pyro.set_rng_seed(5)
    log_w = log_weights(guide, x, 4, **kwargs)
    bound = 6 / log_w.shape[1] * (log_w.logsumexp(0) - math.log(4)).sum()
    assert -loss == pytest.approx(bound.item(), rel=1e-7)


LOSSES = {
    "trace": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean-field": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "stl": lambda: ImportanceWeightedELBO(1, "stl", num_bounds=3),
    "dreg-loop": lambda: ImportanceWeightedELBO(3, "dreg", vectorize_particles=False),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_moves_every_parameter(loss):
    x = simulate(8)
    guide = AutoAmortizedFlow(several, encoder(), **CIF)
    guide.setup(x)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    svi = SVI(several, guide, pyro.optim.Adam({"lr": 0.01}), loss())
    for _ in range(3):  # last layers start at zero, and hide the others from the first gradient
        svi.step(x, size=4)
    for name, p in guide.named_parameters():
        assert (p != before[name]).any(), name


def test_path_gradients_are_those_of_the_bound():
    """On average over particles: STL leaves out what has mean zero."""
    x = simulate(3, torch.float64)
    guide = perturbed(linear, x, **CIF, num_layers=1)
    gradients = []
    for elbo in (
        Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=1),
        ImportanceWeightedELBO(1, "stl", num_bounds=4000, max_plate_nesting=1),
    ):
        guide.zero_grad()
        elbo.loss_and_grads(linear, guide, x)
        gradients.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
    similarity = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert similarity > 0.99
    assert gradients[0].norm() == pytest.approx(gradients[1].norm().item(), rel=0.1)


def folded(x):
    """z_n ~ N(0, 4 I), x_n ~ N((|z_n1|, z_n2), .36 I): two modes a datum."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
        loc = torch.stack([z[..., 0].abs(), z[..., 1]], -1)
        pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)


@pytest.mark.slow
def test_two_modes_a_datum():
    x = torch.tensor([[1.2, 1.0], [1.6, -1.0], [2.0, 0.0], [2.4, 0.5]])
    z = torch.linspace(-12, 12, 12_001)
    first = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(z.abs(), 0.6).log_prob(x[:, :1])
    evidence = torch.trapezoid(first.exp(), z).log()
    evidence = (evidence + dist.Normal(0.0, math.hypot(2.0, 0.6)).log_prob(x[:, 1])).mean().item()
    gaps = {}
    for flow in ("cif", "realnvp"):
        pyro.clear_param_store()
        guide = AutoAmortizedFlow(
            folded, nn.Linear(2, 4), flow=flow, hidden_dims=(16,), init_scale=1.0
        )
        fit(folded, guide, x, num_steps=200, lr=0.02, num_particles=32, progress=False, seed=0)
        elbo = Trace_ELBO(4000, vectorize_particles=True, max_plate_nesting=1)
        with torch.no_grad():
            gaps[flow] = evidence + elbo.loss(folded, guide, x) / len(x)
        if flow == "cif":
            share = (guide.sample_posterior(4000, x)["z"][..., 0] > 0).float().mean(0)
    assert -0.02 < gaps["cif"] < 0.1  # one mode alone: up to log 2
    assert gaps["cif"] < gaps["realnvp"] - 0.08
    assert ((share > 0.3) & (share < 0.7)).all()
