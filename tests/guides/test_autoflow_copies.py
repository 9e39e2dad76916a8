"""Copies and files of `AutoFlow` guides, and other machinery of Pyro that takes them."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_guides import Y, every_guide, model, trained
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    Trace_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.reparam import NeuTraReparam

from pyro_flows_ext.guides import (
    AutoPlanar,
    AutoSylvester,
)
from pyro_flows_ext.infer import fit

# --- copies, files, other machinery of Pyro ---


@every_guide
def test_deepcopy_and_pickle_leave_the_original_usable(guide_type):
    guide = trained(guide_type)
    samples = guide.sample_posterior(5)
    log_q = guide.log_prob(samples)
    deep, loaded = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
    fit(model, guide, Y, num_steps=5, progress=False, warm_start=False)  # the original goes on
    assert (guide.log_prob(samples) != log_q).all()
    for other in (deep, loaded):  # and the copies stay where they were
        torch.testing.assert_close(other.log_prob(samples), log_q)
    with pyro.get_param_store().scope():
        fit(model, deep, Y, num_steps=2, progress=False, warm_start=False)


def test_a_model_with_parameters_of_its_own_copies():
    def empirical():
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Uniform(-scale, scale))

    guide = AutoPlanar(empirical, 1)
    fit(empirical, guide, num_steps=2, progress=False, warm_start=False)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert other.sample_posterior(3)["z"].shape == (3,)


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_predictive_with_a_reloaded_guide(parallel):
    guide = trained(AutoSylvester)
    loaded = pickle.loads(pickle.dumps(guide))
    predictive = Predictive(model, guide=loaded, num_samples=7, parallel=parallel)
    assert predictive(Y)["theta"].reshape(7, -1).shape == (7, 3)


def test_state_dict_round_trip_loads_with_weights_only():
    guide = trained(AutoSylvester)
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    pyro.clear_param_store()
    fresh = AutoSylvester(model)
    fresh.setup(Y)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    samples = guide.sample_posterior(3)
    torch.testing.assert_close(fresh.log_prob(samples), guide.log_prob(samples))


def test_in_a_guide_list():
    guide = AutoGuideList(model)
    guide.append(AutoSylvester(poutine.block(model, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(model, expose=["p", "theta"])))
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    svi.step(Y)
    before = guide[0].transform[0].r.detach().clone()
    svi.step(Y)
    assert (guide[0].transform[0].r != before).any()


def test_neutra_runs_on_a_trained_guide():
    guide = trained(AutoSylvester).requires_grad_(False)
    guide.eval()
    neutra = NeuTraReparam(guide)
    reparametrized = poutine.reparam(model, config=lambda _: neutra)
    mcmc = MCMC(
        NUTS(reparametrized, max_tree_depth=2), num_samples=3, warmup_steps=2, disable_progbar=True
    )
    mcmc.run(Y)
    (latent,) = mcmc.get_samples().values()
    samples = neutra.transform_sample(latent.unsqueeze(-2))
    assert samples["theta"].shape == (3, 3)
    assert samples["theta"].isfinite().all()


def test_one_pass_samples_and_scores():
    guide = AutoSylvester(model)
    guide.setup(Y)
    calls = []
    flow = guide.transform[0]
    for name in ("forward_and_ladj", "inverse_and_ladj"):
        method = getattr(flow, name)
        flow.__dict__[name] = lambda x, name=name, method=method: (calls.append(name), method(x))[1]
    Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(
        model, guide, Y
    )
    assert calls == ["forward_and_ladj"]
