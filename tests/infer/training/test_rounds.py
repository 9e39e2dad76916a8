"""Rounds of `fit` and their verdicts: weights that were lost, chains that drift, and sds that are not known well."""

from importlib import import_module

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.optim import Adam

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer import fit
from pyro_flows_ext.infer.importance import weigh
from pyro_flows_ext.infer.training.verdict import TrustCheck

refining = import_module("pyro_flows_ext.infer.refine.refine")
run = import_module("pyro_flows_ext.infer.training.run")
verdict = import_module("pyro_flows_ext.infer.training.verdict")


def funnel():
    tau = pyro.sample("tau", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), tau.exp()))


def test_a_round_that_lost_all_weights_is_undone(monkeypatch):
    """Draws of weight zero alone have a score without an error, and the round is not trained on from."""
    monkeypatch.setattr(run, "FIRST_ROUND", 5)
    original, states, optimizers, averages = TrustCheck.weigh, [], [], []

    def parameters():
        return [p.detach().clone() for p in guide.parameters()]

    def weigh_or_lose(self):
        result = original(self)
        states.append(parameters())
        if len(states) == 2:
            lost = torch.full_like(result.log_weights, -torch.inf)
            return weigh(result.samples, lost, torch.zeros_like(lost))
        return result

    def optim(params):
        optimizers.append(Adam(params, lr=1e-2))
        return optimizers[-1]

    def stop_after_a_round(state):
        states.append(parameters())
        averages.append(len(optimizers[-1].state))
        state.stop = True

    monkeypatch.setattr(TrustCheck, "weigh", weigh_or_lose)
    guide = AutoIAF(funnel)
    options = {"optim": optim, "target_ess": 0.9999, "refine": False, "progress": False}
    fit(funnel, guide, seed=0, callback=stop_after_a_round, **options)
    start, trained, restored = states[:3]
    assert not all(map(torch.equal, start, trained))
    assert all(map(torch.equal, start, restored))
    assert averages == [0]


@pytest.mark.parametrize("num_chains", [64, 32])
def test_twice_the_draws_are_made_where_an_sd_is_not_known(num_chains, monkeypatch):
    """Also with the fewer chains of dear gradients, which by default stop at fewer draws."""
    monkeypatch.setattr(verdict, "MAX_SD_ERROR", 1e-4)
    monkeypatch.setattr(verdict, "CHAIN_ESS", 400.0)
    seconds = ((-1.0, 128), (float("inf"), num_chains))
    monkeypatch.setattr(refining, "CHAINS_BY_SECONDS", seconds)
    found, original = [], refining.refine_density

    def recorded(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(verdict, "refine_density", recorded)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("t", dist.StudentT(torch.tensor(8.0, dtype=torch.float64)))

    fit(model, AutoIAF(model), target_ess=0.9999, seed=0, progress=False, max_steps=1)
    first, more = found[:2]
    assert first.mixed
    assert len(first.chains.u) == len(more.chains.u) == num_chains
    assert more.min_ess >= 2 * first.min_ess


def normal():
    pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))


@pytest.mark.parametrize("refine", [True, False])
def test_even_weights_do_not_count_where_chains_drift(refine, monkeypatch):
    """A guide too narrow by a factor of two, whose weights are taken for good."""
    monkeypatch.setattr(TrustCheck, "is_good", lambda *_: True)
    guide = AutoIAF(normal, init_scale=0.5)
    options = {"max_steps": 1, "lr": 1e-9, "warm_start": False, "progress": False}
    result = fit(normal, guide, refine=refine, seed=0, **options)
    assert result.trusted == refine
    assert (result.refined is not None) == refine
    if refine:
        assert result.sample(4000)["z"].std().item() == pytest.approx(1.0, abs=0.06)


def test_the_guide_draws_more_where_its_weights_are_good_and_an_sd_is_not_known(monkeypatch):
    monkeypatch.setattr(verdict, "MAX_SD_ERROR", 1e-4)
    result = fit(normal, AutoIAF(normal), seed=0, progress=False, max_steps=1)
    assert result.importance.num_samples == 2 * run.NUM_DRAWS
