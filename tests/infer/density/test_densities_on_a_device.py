"""Densities that train on a GPU, from rows in memory and from rows there: on a fake device, which refuses tensors on the CPU.

The contract moves densities and scores with fake tensors. Here are `fit_density`, checkpoints, files, and what densities have
beside draws and scores.
"""

import pyro.distributions as dist
import pytest
import torch
from densities import DENSITIES
from fake_device import DEVICE, FakeDevice, OnDevice
from pyro import poutine

import pyro_flows_ext as pf
import pyro_flows_ext.distributions as D
import pyro_flows_ext.transforms as T

OPTIONS = {"num_steps": 2, "batch_size": 8, "progress": False, "seed": 0}


@pytest.fixture
def device():
    with FakeDevice():
        yield DEVICE


def all_on_device(tensors):
    tensors = list(tensors)
    return bool(tensors) and all(isinstance(t, OnDevice) for t in tensors)


def normal(*shape):
    return dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))


# Rows on the device take another path in shuffling and standardising alone.
ON_DEVICE = ["flow-nsf", "conditional-flow", "indexed-context", "multi-scale"]
CASES = [
    *((name, "memory") for name in DENSITIES if name != "flow-batched-base"),
    *((name, "device") for name in ON_DEVICE),
]


@pytest.mark.parametrize(("name", "where"), CASES)
def test_a_density_trains_on_the_device(name, where, device):
    entry = DENSITIES[name]
    density = entry.make().to(device)
    context = torch.randn(20, entry.context_dim) if entry.context_dim else None
    here = density if context is None else density.condition(context.to(device))
    x = here.sample(() if context is not None else (20,)).cpu()
    if where == "device":
        x, context = x.to(device), None if context is None else context.to(device)
    standardize = name != "angles" and density.event_shape == x.shape[1:] and x.dim() == 2
    result = pf.fit_density(density, x, context, standardize=standardize, **OPTIONS)
    assert result.losses.isfinite().all()
    assert all_on_device(density.parameters())
    assert all_on_device(density.buffers()) or not list(density.buffers())
    x = x.to(device)
    here = density if context is None else density.condition(context.to(device))
    assert all_on_device([here.sample(), here.objective(x)])
    if not density.exact_log_prob:
        assert all_on_device([here.log_prob_bound(x, num_particles=3)])


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_counts_stay_on_the_device(kind, device):
    density = D.Dequantized(pf.flows.NSF(2, num_layers=1, hidden_dims=(4,)), kind, num_levels=8)
    density.to(device)
    x = torch.randint(8, (20, 2)).float()
    pf.fit_density(density, x, **OPTIONS)
    assert all_on_device([density.sample((3,)), density.bits_per_dim(x.to(device))])


def test_ordered_latents_stay_on_the_device(device):
    density = D.NestedDropoutFlow(normal(3), [T.affine_coupling(3, (4,)), T.LULinear(3)]).to(device)
    x = torch.randn(5, 3, device=device)
    k = torch.tensor([1, 2, 3, 1, 2], device=device)
    assert all_on_device([density.project(x, 1), density.project(x, k), density.reconstruct(x, 2)])
    assert all_on_device([density.reconstruction_curve(x), density.sample_truncated(2, (4,))])
    assert all_on_device([density.penalty(x), density.penalty(x, k), density.sample_index((2,))])
    trace = poutine.trace(density.observe).get_trace("x", x)
    trace.compute_log_prob()
    assert all_on_device([trace.nodes[name]["log_prob"] for name in ("x", "x_penalty")])
    assert all_on_device([density.quantiles([0.1, 0.5], num_samples=50)])


def test_contributions_by_dimension_stay_on_the_device(device):
    def level(shape):
        return T.affine_coupling(shape, (4,))

    flow = D.MultiScaleFlow((2, 4, 4), level, 2, factor_out="none").to(device)
    x = torch.randn(5, 2, 4, 4, device=device)
    assert all_on_device(flow.contributions(x))
    factored = flow.factored(flow.likelihood_masks(x))
    assert all_on_device([factored.log_prob(x), factored.sample((2,)), *factored.parameters()])


@pytest.mark.parametrize("devices", [(DEVICE, "cpu"), ("cpu", DEVICE), (DEVICE, DEVICE)], ids=str)
def test_a_checkpoint_goes_on_on_another_device(devices, tmp_path, device):
    x, steps = torch.randn(40, 2), []

    def stop(state):
        state.stop = True

    for place, callback in zip(devices, (stop, None), strict=True):
        density = pf.flows.NSF(2, num_layers=1, hidden_dims=(4,)).to(place)
        options = {**OPTIONS, "num_steps": 4, "evaluate_every": 2, "callback": callback}
        path = tmp_path / "run.pt"
        result = pf.fit_density(density, x, checkpoint=path, resume=True, **options)
        steps.append(result.steps)
        assert all(p.device == torch.device(place) for p in density.parameters())
    assert steps == [2, 4]
    assert result.losses.isfinite().all()


def test_a_density_of_the_device_is_read_without_it(tmp_path):
    density, x = pf.flows.NSF(2, num_layers=1, hidden_dims=(4,)), torch.randn(5, 2)
    density.standardize(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5]))
    expected = density.log_prob(x).detach()
    with FakeDevice():
        pf.save(density.to(DEVICE), tmp_path / "density.pt")
    again = pf.load(tmp_path / "density.pt").density
    torch.testing.assert_close(again.log_prob(x).detach(), expected)
    with FakeDevice():
        moved = pf.load(tmp_path / "density.pt").density.to(DEVICE)
        assert all_on_device([moved.log_prob(x.to(DEVICE)), moved.sample((2,))])
