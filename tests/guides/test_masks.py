"""Latents that the model masks: the bound is at most the evidence, and masked draws follow their prior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import tensor

from pyro_flows_ext.diagnostics import importance
from pyro_flows_ext.guides import AutoHamiltonian, AutoIAF
from pyro_flows_ext.infer import fit

N = dist.Normal
Y = tensor([1.5, 2.5, 1.0, 3.0, 2.0, 2.2])
SEEN = tensor([True, True, False, True, False, False])
LENGTHS = tensor([[True, True, True], [True, True, False]])
SERIES = tensor([[0.5, 1.0, 2.0], [1.5, 0.3, 9.0]])


def normal_mean(y, sd=3.0):
    """The evidence of y_i ~ N(a, 1), a ~ N(0, sd²)."""
    n = len(y)
    return dist.MultivariateNormal(torch.zeros(n), torch.eye(n) + sd**2).log_prob(y)


def partially_observed(y=Y, seen=SEEN):
    a = pyro.sample("a", N(0.0, 3.0))
    with pyro.plate("d", len(y)):
        pyro.sample("y", N(a, 1.0), obs=y, obs_mask=seen)


def padded(y=SERIES, mask=LENGTHS):
    with pyro.plate("seq", 2, dim=-2), pyro.plate("t", 3, dim=-1), poutine.mask(mask=mask):
        z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("y", N(z, 1.0), obs=y)


def masked_distribution(y=SERIES, mask=LENGTHS):
    with pyro.plate("seq", 2, dim=-2), pyro.plate("t", 3, dim=-1):
        z = pyro.sample("z", N(0.0, 1.0).expand(mask.shape).mask(mask))
        pyro.sample("y", N(z, 1.0).mask(mask), obs=y)


def masked_within_an_event(y=SERIES, mask=LENGTHS):
    z = pyro.sample("z", N(0.0, 1.0).expand(mask.shape).mask(mask).to_event(2))
    pyro.sample("y", N(z, 1.0).mask(mask).to_event(2), obs=y)


def all_masked():
    pyro.sample("z", N(0.0, 1.0).expand([2]).mask(False).to_event(1))
    with poutine.mask(mask=False):
        pyro.sample("w", N(3.0, 2.0))
    pyro.sample("y", N(pyro.sample("a", N(0.0, 1.0)), 1.0), obs=tensor(1.0))


SERIES_EVIDENCE = float(N(0.0, 2**0.5).log_prob(SERIES)[LENGTHS].sum())
MASKED = {
    "obs_mask": (partially_observed, float(normal_mean(Y[SEEN]))),
    "padded": (padded, SERIES_EVIDENCE),
    "dist.mask": (masked_distribution, SERIES_EVIDENCE),
    "within an event": (masked_within_an_event, SERIES_EVIDENCE),
    "all": (all_masked, float(N(0.0, 2**0.5).log_prob(tensor(1.0)))),
}


@pytest.mark.parametrize(
    "name",
    [
        "obs_mask",
        pytest.param("padded", marks=pytest.mark.slow),  # two more tests below train on it
        pytest.param("dist.mask", marks=pytest.mark.slow),  # as within an event
        "within an event",
        "all",
    ],
)
def test_the_bound_is_below_the_evidence(name):
    model, evidence = MASKED[name]
    guide = AutoIAF(model)
    result = fit(model, guide, num_steps=100, num_particles=8, seed=0, progress=False)
    assert evidence - 0.1 < result.elbo < evidence + 0.02
    assert float(importance(guide, model).log_evidence) == pytest.approx(evidence, abs=0.03)
    for elbo in (Trace_ELBO(50), TraceMeanField_ELBO(50)):
        bound = -SVI(model, guide, pyro.optim.Adam({}), elbo).evaluate_loss()
        assert bound < evidence + 0.1


def test_masked_draws_follow_their_prior():
    guide = AutoIAF(partially_observed)
    fit(partially_observed, guide, num_steps=150, num_particles=8, seed=0, progress=False)
    draws = guide.sample_posterior(4000)
    off = draws["y_unobserved"] - draws["a"].unsqueeze(-1)
    torch.testing.assert_close(off.mean(0), torch.zeros(6), atol=0.12, rtol=0)
    torch.testing.assert_close(off.std(0), torch.ones(6), atol=0.12, rtol=0)


def test_masks_that_change_with_the_arguments():
    guide = AutoIAF(partially_observed)
    guide.setup(Y, SEEN)
    svi = SVI(partially_observed, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(10))
    for seen in (SEEN, ~SEEN, torch.ones(6) > 0, torch.ones(6) > 2):
        evidence = float(normal_mean(Y[seen])) if seen.any() else 0.0
        assert math.isfinite(svi.step(Y, seen))
        found = importance(guide, partially_observed, Y, seen, num_samples=4000)
        assert -found.elbo > -evidence - 0.1
    fit(partially_observed, guide, Y, ~SEEN, num_steps=100, seed=0, progress=False)
    found = importance(guide, partially_observed, Y, ~SEEN)
    assert float(found.log_evidence) == pytest.approx(float(normal_mean(Y[~SEEN])), abs=0.05)


def test_a_mask_that_hides_something_after_the_setup_only():
    guide = AutoIAF(padded)
    guide.setup(SERIES, LENGTHS | True)
    fit(padded, guide, SERIES, LENGTHS, num_steps=100, seed=0, progress=False)
    found = importance(guide, padded, SERIES, LENGTHS)
    assert float(found.elbo) < SERIES_EVIDENCE + 0.02
    assert float(found.log_evidence) == pytest.approx(SERIES_EVIDENCE, abs=0.03)


def test_a_flat_prior_counts():
    # The mask takes the prior away, and the likelihood makes the posterior N(3, 1) with evidence ∫ N(3 | z, 1) dz = 1.
    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", N(0.0, 1.0))
        pyro.sample("y", N(z, 1.0), obs=tensor(3.0))

    guide = AutoIAF(model)
    result = fit(model, guide, num_steps=100, num_particles=8, seed=0, progress=False)
    assert result.elbo == pytest.approx(0.0, abs=0.05)
    assert float(guide.sample_posterior(4000)["z"].mean()) == pytest.approx(3.0, abs=0.1)


def test_a_guide_that_moves_along_the_posterior():
    guide = AutoHamiltonian(padded, 2)
    result = fit(padded, guide, num_steps=30, num_particles=4, seed=0, progress=False)
    assert abs(result.elbo - SERIES_EVIDENCE) < 0.1 + 3 * result.elbo_se
