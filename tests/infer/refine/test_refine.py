"""`refine` on guides of every kind: right answers from wrong guides, and what it reports."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_flows_ext.guides import AutoIAF, AutoPlanar
from pyro_flows_ext.infer.refine import refine, refine_density, start_at, verify

Y = torch.tensor([0.3, 1.9, 1.2, -0.4, 1.5])


def normal_gamma(y):
    """mu | tau ~ N(0, 1 / tau), tau ~ Gamma(3, 2), y ~ N(mu, 1 / tau): tau given y is a Gamma, mu a Student's t."""
    tau = pyro.sample("tau", dist.Gamma(y.new_tensor(3.0), y.new_tensor(2.0)))
    mu = pyro.sample("mu", dist.Normal(0.0, tau.rsqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


def exact(y):
    """Mean and sd of tau and mu given y."""
    n, total = len(y), float(y.sum())
    shape = 3 + n / 2
    rate = 2 + (float(y.square().sum()) - total**2 / (n + 1)) / 2
    return {
        "tau": (shape / rate, math.sqrt(shape) / rate),
        "mu": (total / (n + 1), math.sqrt(rate / (shape - 1) / (n + 1))),
    }


def setup(guide, y=Y):
    with torch.no_grad():
        guide(y)
    return guide


GUIDES = {
    "AutoIAF": AutoIAF,
    "AutoPlanar": AutoPlanar,
    "AutoNormal": lambda model: AutoNormal(model, init_scale=0.5),
    "AutoDiagonalNormal": lambda model: AutoDiagonalNormal(model, init_scale=0.5),
    "AutoMultivariateNormal": lambda model: AutoMultivariateNormal(model, init_scale=0.5),
    "AutoLowRankMultivariateNormal": lambda m: AutoLowRankMultivariateNormal(m, init_scale=0.5),
}


@pytest.mark.parametrize("name", GUIDES)
def test_untrained_guides_end_at_the_posterior(name):
    guide = setup(GUIDES[name](normal_gamma))
    result = refine(normal_gamma, guide, Y, seed=1)
    assert result.mixed, result.problems
    for site, (mean, sd) in exact(Y).items():
        draws = result.flat()[site]
        ess = float(result.ess[site])
        assert abs(draws.mean() - mean) < 4 * sd / ess**0.5
        assert abs(draws.std() / sd - 1) < 0.1
    assert result.drift.detected
    assert result.drift.names == ("tau", "mu")
    assert "drift in" in str(result)


def test_a_guide_by_hand_and_a_list_of_guides():
    def by_hand(y):
        pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        pyro.sample("mu", dist.Normal(0.5, 0.5))

    several = AutoGuideList(normal_gamma)
    several.append(AutoNormal(pyro.poutine.block(normal_gamma, expose=["tau"]), init_scale=0.4))
    several.append(AutoNormal(pyro.poutine.block(normal_gamma, expose=["mu"]), init_scale=0.4))
    for guide in (by_hand, setup(several)):
        result = refine(normal_gamma, guide, Y, seed=2)
        assert result.mixed
        for site, (mean, sd) in exact(Y).items():
            assert abs(result.flat()[site].mean() - mean) < 4 * sd / float(result.ess[site]) ** 0.5


def gaussian(x):
    pyro.sample("z", dist.Normal(x, torch.tensor([1.0, 2.0, 0.5])).to_event(1))


def exact_guide(loc=0.0, scale=1.0):
    guide = AutoDiagonalNormal(gaussian)
    guide(torch.zeros(3))
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([loc, 0.0, 0.0]))
        guide.scale = torch.tensor([scale, 2.0, 0.5])
    return guide


def check(**change):
    target, start = start_at(gaussian, exact_guide(**change), (torch.zeros(3),), {})
    return verify(target, start)


def test_verification_of_right_guides():
    results = [check() for _ in range(6)]
    assert sum(r.drift.detected for r in results) == 0
    assert sum(r.drift.conclusive for r in results) >= 5
    assert all(r.num_gradients <= 150 for r in results)


@pytest.mark.parametrize("change", [{"loc": 0.2}, {"loc": -0.2}, {"scale": 1.2}, {"scale": 0.83}])
def test_verification_of_wrong_guides(change):
    results = [check(**change) for _ in range(3)]
    assert sum(r.drift.detected for r in results) >= 2
    for r in results:
        assert r.drift.names[r.drift.worst] == "z[0]"


def test_a_model_that_raises_has_density_zero_there():
    def picky(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if bool((mu < 0).any()):
            raise ValueError("mu below zero")
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = AutoNormal(
        picky, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"mu": torch.tensor(1.0)})
    )
    guide(torch.tensor(0.5))
    result = refine(picky, guide, torch.tensor(0.5), num_chains=16, max_gradients=40, seed=0)
    assert (result.samples["mu"] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seed_state_and_dtype(dtype):
    y = Y.to(dtype)
    guide = setup(AutoPlanar(normal_gamma, 2), y)
    flags = {n: (p.clone(), p.requires_grad) for n, p in guide.named_parameters()}
    guide.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = refine(normal_gamma, guide, y, seed=5, num_chains=16, max_gradients=60)
    assert torch.equal(torch.get_rng_state(), before)
    second = refine(normal_gamma, guide, y, seed=5, num_chains=16, max_gradients=60)
    other = refine(normal_gamma, guide, y, seed=6, num_chains=16, max_gradients=60)
    assert torch.equal(first.samples["tau"], second.samples["tau"])
    assert not torch.equal(first.samples["tau"][:, :4], other.samples["tau"][:, :4])
    assert first.samples["tau"].dtype == dtype
    assert guide.training
    for name, p in guide.named_parameters():
        assert torch.equal(p, flags[name][0])
        assert p.requires_grad == flags[name][1]
        assert p.grad is None


def test_the_shape_of_a_result():
    def model(x):
        pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("s", dist.LogNormal(torch.zeros(2, 2), 1.0).to_event(2))

    guide = AutoNormal(model)
    guide(torch.zeros(1))
    result = refine(model, guide, torch.zeros(1), num_chains=32, max_gradients=300, seed=0)
    C, S = result.shape
    assert C == 32
    assert result.samples["w"].shape == (C, S, 3)
    assert result.samples["s"].shape == (C, S, 2, 2)
    torch.testing.assert_close(result.samples["w"].sum(-1), torch.ones(C, S))
    assert result.r_hat["s"].shape == result.ess["s"].shape == (2, 2)
    assert result.flat(7)["s"].shape == (7, 2, 2)
    assert result.flat(C * S + 1)["w"].shape == (C * S + 1, 3)
    assert result.to_arrays()["w"].shape == (C, S, 3)
    assert result.drift.names[:3] == ("w[0]", "w[1]", "s[0,0]")
    with pytest.raises(ValueError, match="num: expected"):
        result.flat(0)


def test_budgets():
    guide = setup(AutoNormal(normal_gamma))
    few = refine(normal_gamma, guide, Y, max_gradients=30, num_chains=16, seed=0)
    assert few.num_gradients <= 30
    assert not few.mixed
    assert "Not mixed" in str(few)
    short = refine(
        normal_gamma, guide, Y, max_gradients=10**6, max_seconds=0.2, num_chains=8, seed=0
    )
    assert short.seconds < 5


def test_refusals():
    with pytest.raises(ValueError, match="num_chains: expected 8"):
        refine(normal_gamma, setup(AutoNormal(normal_gamma)), Y, num_chains=4)
    with pytest.raises(ValueError, match="has not been set up"):
        refine(normal_gamma, AutoNormal(normal_gamma), Y)

    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as i:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    with pytest.raises(ValueError, match=r"\['data'\] are subsampled"):
        refine(subsampled, setup(AutoNormal(subsampled)), Y)
    with pytest.raises(ValueError, match=r"poin"):
        refine(normal_gamma, setup(AutoDelta(normal_gamma)), Y)


def test_chains_give_up_where_the_budget_is_too_small_by_far():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 300.0])).to_event(1))

    guide = AutoNormal(model, init_scale=1.0)
    with torch.no_grad():
        guide()
    target, start = start_at(model, guide, (), {})
    spent = {}
    for gives_up in (False, True):
        torch.manual_seed(0)
        result = refine_density(target, start, max_gradients=400, gives_up=gives_up)
        assert not result.mixed
        spent[gives_up] = result.num_gradients
    assert spent[True] < 0.8 * spent[False]
