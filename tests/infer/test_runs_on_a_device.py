"""Runs whose data are on a GPU: every entry point on a fake device, which refuses tensors on the CPU and has values.

Guides and densities by themselves have device tests of their own, with fake tensors. Here are the loops around them, which read
values: training, weights, chains, warm starts, checkpoints and files.
"""

from importlib import import_module

import pyro
import pyro.distributions as dist
import pytest
import torch
from fake_device import DEVICE, FakeDevice, MixedDevices, OnDevice
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_flows_ext as pf
from pyro_flows_ext.infer import AnnealedELBO

refining = import_module("pyro_flows_ext.infer.refine.refine")
run = import_module("pyro_flows_ext.infer.training.run")
verdict = import_module("pyro_flows_ext.infer.training.verdict")

GROUP = torch.tensor([0, 0, 1, 1])
Y = torch.tensor([1.0, -0.5, 2.0, 0.3])


@pytest.fixture
def device():
    with FakeDevice():
        yield DEVICE


def model(y, group):
    """Two latents, one of which is positive."""
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 0.3))
    with pyro.plate("data", len(y), device=y.device):
        pyro.sample("y", dist.Normal(loc, scale), obs=y)


def grouped(y, group):
    """Effects by group, for which particles run under `torch.vmap`."""
    effect = pyro.sample("effect", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y), device=y.device):
        pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


def local_model(y):
    with pyro.plate("data", len(y), device=y.device):
        z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def amortized(flow=None):
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4)).to(DEVICE)
    return pf.AutoAmortizedFlow(local_model, encoder, flow=flow)


def all_on_device(tensors):
    tensors = list(tensors)
    return bool(tensors) and all(isinstance(t, OnDevice) for t in tensors)


# --- the fake device itself ---


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.zeros(3),
        lambda x: torch.cat([x, torch.zeros(1)]),
        lambda x: torch.stack([x[0], torch.zeros(())]),
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, 0.0),
        lambda x: torch.zeros(3)[x.argsort()],
        lambda x: x.index_select(0, torch.arange(2)),
        lambda x: torch.eye(3) @ x,
        lambda x: x.add_(torch.zeros(3)),
        lambda x: torch.func.vmap(lambda row: row + torch.zeros(3))(x.expand(2, 3)),
        lambda x: torch.randperm(3).to(x) + torch.randperm(3),
        lambda x: nn.Linear(3, 2)(x),
    ],
)
def test_the_fake_device_refuses_tensors_on_the_cpu(mixed, device):
    with pytest.raises(MixedDevices):
        mixed(torch.ones(3, device=device))


def test_the_fake_device_takes_its_own_tensors_and_those_a_gpu_takes(device):
    x = torch.tensor([3.0, 1.0, 2.0], device=device, requires_grad=True)
    y = torch.tensor(2.0) * x[torch.tensor([0, 2])] + x.new_tensor([1.0, 2.0])
    y = y + torch.zeros(2, device=x.device) + torch.zeros_like(y)
    y.sum().backward()
    assert all_on_device([x, y, x.grad, torch.eye(2, device=device), x.sort().indices])
    assert y.tolist() == [7.0, 6.0]
    assert x.grad.cpu().equal(torch.tensor([2.0, 0.0, 2.0]))
    assert type(y.detach().cpu()) is torch.Tensor
    assert y.sum().item() == 13.0


# --- entry points ---


@pytest.fixture
def few(monkeypatch):
    """Fewer draws, chains and gradients, which take longer here."""
    options = {"num_chains": 8, "max_gradients": 25}

    def refine_density(*args, **kwargs):
        return refining.refine_density(*args, **{**kwargs, **options})

    monkeypatch.setattr(run, "NUM_DRAWS", 100)
    monkeypatch.setattr(verdict, "refine_density", refine_density)
    monkeypatch.setattr(refining, "POPULATION", 100)


@pytest.mark.parametrize("name", ["flow", "normal", "grouped"])
def test_fit_stays_on_the_device(name, device, few):
    """Steps, weights, chains and the verdict."""
    program = grouped if name == "grouped" else model
    guide = AutoNormal(program) if name == "normal" else pf.AutoIAF(program)
    options = {"num_steps": 3, "num_particles": 4, "refine": True, "warm_start": False}
    y, group = Y.to(device), GROUP.to(device)
    result = pf.fit(program, guide, y, group, target_ess=0.9999, seed=0, progress=False, **options)
    assert result.steps == 3
    assert result.refined is not None
    assert all_on_device(result.refined.samples.values())
    assert all_on_device(result.sample(3).values())
    assert all_on_device(result.guide.parameters())
    if name != "normal":  # of which every draw is a run of the guide
        assert result.summary(10).notna().all(axis=None)
    assert result.losses.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CIF", "Hamiltonian"])
def test_fit_of_a_bound_stays_on_the_device(name, device, few):
    y, group = Y.to(device), GROUP.to(device)
    guide = getattr(pf, f"Auto{name}")(model)
    options = {
        "num_steps": 2,
        "num_particles": 2,
        "warm_start": False,
        "progress": False,
        "seed": 0,
    }
    result = pf.fit(model, guide, y, group, **options)
    assert all_on_device(result.sample(3).values())
    if name == "CIF":
        samples = guide.sample_posterior(3)
        assert all_on_device([guide.log_prob_bound(samples, num_particles=5)])


def test_refine_and_importance_stay_on_the_device(device, few):
    y, group = Y.to(device), GROUP.to(device)
    guide = pf.AutoIAF(model)
    guide(y, group)
    refined = pf.refine(model, guide, y, group, num_chains=8, max_gradients=40, seed=0)
    assert all_on_device([*refined.samples.values(), *refined.flat().values()])
    weighed = pf.importance(model, guide, y, group, num_samples=50)
    assert all_on_device([*weighed.samples.values(), *weighed.resample().values()])
    assert all_on_device([*guide.median().values(), *guide.quantiles([0.1, 0.9]).values()])
    assert all_on_device([guide.log_prob(guide.sample_posterior(3))])


@pytest.mark.slow
def test_warm_start_stays_on_the_device(device):
    y, group = Y.to(device), GROUP.to(device)
    guide = pf.AutoIAF(model)
    guide(y, group)
    pf.warm_start(model, guide, y, group)
    assert all_on_device([guide.whitening.loc, guide.whitening.scale_tril])


@pytest.mark.parametrize(
    "loss",
    [
        *(pf.ImportanceWeightedELBO(3, gradient) for gradient in ("iwae", "dreg")),
        pf.ImportanceWeightedELBO(1, "stl", num_bounds=3),
        AnnealedELBO(Trace_ELBO(), lambda step: 0.5),
    ],
    ids=["iwae", "dreg", "stl", "annealed"],
)
@pytest.mark.parametrize("kind", ["global", "local"])
def test_steps_of_bounds_stay_on_the_device(loss, kind, device):
    y = Y.to(device)
    if kind == "global":
        program, guide, args = model, pf.AutoIAF(model), (y, GROUP.to(device))
    else:
        program, guide, args = local_model, amortized("iaf"), (y,)
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    svi.step(*args)
    assert svi.step(*args) == pytest.approx(svi.evaluate_loss(*args), rel=1.0)
    grads = [p.grad for p in guide.parameters() if p.grad is not None]
    assert all_on_device(guide.parameters())
    assert not grads or all_on_device(grads)


def test_an_amortized_guide_trains_on_the_device_in_mini_batches(device):
    def batches(y, size):
        with pyro.plate("data", len(y), subsample_size=size, device=y.device) as index:
            z = pyro.sample("z", dist.Normal(y.new_zeros(size, 2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y[index])

    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4)).to(DEVICE)
    guide = pf.AutoAmortizedFlow(batches, encoder)
    y = torch.randn(100_000, device=device)  # so many that indices are drawn without a permutation
    pf.fit(batches, guide, y, 5, num_steps=2, num_particles=1, progress=False, seed=0)
    assert all_on_device([*guide.parameters(), guide.sample_posterior(2, y[:3], 3)["z"]])


@pytest.mark.parametrize("devices", [(DEVICE, "cpu"), ("cpu", DEVICE)], ids=str)
def test_a_checkpoint_of_fit_goes_on_on_another_device(devices, tmp_path, device, monkeypatch):
    monkeypatch.setattr(run, "FIRST_ROUND", 3)
    monkeypatch.setattr(run, "NUM_DRAWS", 100)
    steps = []

    def stop(state):
        state.stop = True

    for place, callback in zip(devices, (stop, None), strict=True):
        pyro.clear_param_store()
        guide = pf.AutoIAF(model)
        options = {"max_steps": 6, "num_particles": 4, "refine": False, "warm_start": False}
        path = tmp_path / "run.pt"
        args = (Y.to(place), GROUP.to(place))
        options |= {"checkpoint": path, "resume": True, "seed": 0, "target_ess": 0.9999}
        result = pf.fit(model, guide, *args, callback=callback, progress=False, **options)
        steps.append(result.steps)
        assert all(p.device == torch.device(place) for p in guide.parameters())
    assert steps[0] < steps[1]


@pytest.mark.parametrize("guide", [pf.AutoNSF, pf.AutoCIF])
def test_a_guide_of_the_device_is_read_without_it(guide, tmp_path, device):
    y, group = Y.to(device), GROUP.to(device)
    trained = guide(model)
    trained(y, group)
    pf.save(trained, tmp_path / "guide.pt")
    for place in ("cpu", device):
        pyro.clear_param_store()
        saved = pf.load(tmp_path / "guide.pt")
        again = saved.rebuild(guide(model), Y.to(place), GROUP.to(place))
        for p, expected in zip(again.parameters(), trained.parameters(), strict=True):
            assert p.device == torch.device(place)
            assert p.cpu().equal(expected.cpu())
