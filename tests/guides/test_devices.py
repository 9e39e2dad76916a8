"""Guides whose model has its data on a GPU: every tensor of a step is there.

Fake tensors compare the devices of all operands, as a GPU does, and need none: guides are set up on the CPU, and all that a
module's `.to` moves, moves to a device that the model's data are on.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pyro_flows_ext as pf

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GUIDES = {
    "nsf": pf.AutoNSF,
    "iaf": pf.AutoIAF,
    "maf": pf.AutoMAF,
    "realnvp": pf.AutoRealNVP,
    "planar": pf.AutoPlanar,
    "radial": pf.AutoRadial,
    "sylvester": pf.AutoSylvester,
    "residual": pf.AutoResidual,
    "cif": pf.AutoCIF,
    "hamiltonian": pf.AutoHamiltonian,
}
Y = torch.tensor([1.0, -0.5, 2.0, 0.3])


def model(y):
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), y.new_ones(2)).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), y.new_ones(())))
    with pyro.plate("data", len(y), device=y.device):
        pyro.sample("y", dist.Normal(loc[0] + loc[1], scale), obs=y)


def local_model(y):
    with pyro.plate("data", len(y), device=y.device):
        z = pyro.sample("z", dist.Normal(y.new_zeros(2), y.new_ones(2)).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), y.new_ones(())), obs=y)


def amortized(flow):
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))
    return pf.AutoAmortizedFlow(local_model, encoder, flow=flow)


def loss_of(guide, model, y):
    """Minus the ELBO of one draw, as Pyro computes it."""
    trace = poutine.trace(guide).get_trace(y)
    joint = poutine.trace(poutine.replay(model, trace=trace)).get_trace(y)
    return trace.log_prob_sum() - joint.log_prob_sum()


# The Hamiltonian guide holds the data of its setup, in the potential.
@pytest.mark.parametrize("name", [name for name in GUIDES if name != "hamiltonian"])
def test_a_step_of_a_guide_stays_on_the_device(name):
    _check(GUIDES[name](model), model)


@pytest.mark.parametrize("flow", [None, "planar", "sylvester", "iaf", "realnvp", "cif"], ids=str)
def test_a_step_of_an_amortized_guide_stays_on_the_device(flow):
    _check(amortized(flow), local_model)


def _check(guide, model):
    guide(Y)
    with pyro.validation_enabled(False), FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def to_fake(tensor):
            return fake.from_tensor(tensor.detach()).to("meta")

        guide._apply(to_fake)
        pyro.clear_param_store()  # it holds the parameters before the move
        loss = loss_of(guide, model, to_fake(Y))
        assert loss.device.type == "meta"
        loss.backward()
        reached = [p for p in guide.parameters() if p.grad is not None]
        assert reached
        assert all(p.grad.device.type == "meta" for p in reached)


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("name", list(GUIDES))
def test_a_guide_trains_on_a_gpu(name):
    y = Y.cuda()
    guide = GUIDES[name](model)
    result = pf.fit(model, guide, y, num_steps=20, refine=False, progress=False, seed=0)
    assert result.losses.isfinite().all()
    assert all(p.is_cuda for p in guide.parameters())
    assert result.sample(10)["loc"].is_cuda


@pytest.mark.cuda
@ON_GPU
def test_fit_is_trusted_on_a_gpu():
    y = Y.cuda()
    result = pf.fit(model, pf.AutoIAF(model), y, refine=True, progress=False, seed=0)
    assert result.trusted
    assert pf.refine(model, result.guide, y, seed=0).samples["loc"].is_cuda
    assert result.sample(10)["loc"].is_cuda


@pytest.mark.cuda
@ON_GPU
@pytest.mark.parametrize("flow", ["planar", "iaf"])
def test_an_amortized_guide_trains_on_a_gpu(flow):
    y = Y.cuda()
    guide = amortized(flow)
    guide.encoder.cuda()
    result = pf.fit(local_model, guide, y, num_steps=20, progress=False, seed=0)
    assert result.losses.isfinite().all()
    assert guide.sample_posterior(3, y)["z"].is_cuda


@pytest.mark.cuda
@ON_GPU
def test_a_standardised_density_trains_on_a_gpu_from_rows_in_memory():
    torch.manual_seed(0)
    density = pf.flows.NSF(2, num_layers=2).cuda()
    x = 100 * torch.randn(500, 2) + 30
    result = pf.fit_density(density, x, standardize=True, num_steps=20, progress=False, seed=0)
    assert result.losses.isfinite().all()
    assert density.sample((4,)).is_cuda
    assert density.log_prob(x.cuda()).is_cuda


@pytest.mark.cuda
@ON_GPU
def test_a_checkpoint_of_a_gpu_goes_on_without_one(tmp_path):
    x = torch.randn(200, 2)

    def stop(state):
        state.stop = True

    steps = []
    for device, callback in (("cuda", stop), ("cpu", None)):
        density = pf.flows.NSF(2, num_layers=1).to(device)
        options = {"num_steps": 20, "evaluate_every": 10, "progress": False, "callback": callback}
        path = tmp_path / "run.pt"
        result = pf.fit_density(density, x, checkpoint=path, resume=True, seed=0, **options)
        steps.append(result.steps)
    assert steps == [10, 20]
