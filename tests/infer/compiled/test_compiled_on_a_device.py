"""The graphs of compiled steps of a model on a GPU: every tensor in them is there.

Meta tensors, which have no values, stand in for those of a GPU. Tracing reads none, so that graph, update and inputs are made
as they are there. The eager first step and the comparison with the handlers read values, and are left out.
"""

from importlib import import_module

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_flows_ext as pf
from pyro_flows_ext.infer import AnnealedELBO
from pyro_flows_ext.infer.compiled.unsupported import UnsupportedForCompilation

MODULES = [
    import_module(f"pyro_flows_ext.infer.compiled.{name}")
    for name in ("call", "tracing", "signature", "program")
]
CALL, TRACING, SIGNATURE, PROGRAM = MODULES
UPDATES = import_module("pyro_flows_ext.infer.compiled.updates")
META = torch.device("meta")
Y = torch.tensor([1.0, -0.5, 2.0, 0.3])


@pytest.fixture(autouse=True)
def _storages_of_meta_tensors(monkeypatch):
    """Meta tensors have no addresses: their storages do."""

    def storages(tensors):
        return {t.untyped_storage()._cdata for t in tensors if t.numel()}

    def place(t):
        return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()

    for module in MODULES:
        for name, new in (("storages", storages), ("place", place)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, new)
    monkeypatch.setattr(SIGNATURE, "verify", lambda *_, **__: None)
    monkeypatch.setattr(PROGRAM, "_check_memory", lambda *_: None)


def model(y):
    loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), y.new_ones(2)).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(y.new_zeros(()), 0.3))
    with pyro.plate("data", len(y), device=y.device):
        pyro.sample("y", dist.Normal(loc.sum(-1), scale), obs=y)


def local_model(y):
    with pyro.plate("data", len(y), subsample_size=3, device=y.device) as index:
        z = pyro.sample("z", dist.Normal(y.new_zeros(3, 2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y[index])


def amortized():
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))
    return pf.AutoAmortizedFlow(local_model, encoder, flow="iaf")


def on_meta(guide, y):
    """The guide after a call, with its parameters and the data on the device."""
    guide(y)
    guide.to(META)
    pyro.clear_param_store()  # it holds the parameters before the move
    return y.to(META)


def devices_of_step(model, guide, loss, y, optim=torch.optim.Adam):
    """Traces a compiled step; returns the devices of all tensors in its graph, inputs included."""
    found = set()

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            # Inputs that nothing reads do no harm: plates of Pyro make some to find the default device.
            if "val" in node.meta and (node.users or node.op != "placeholder"):
                values = node.meta["val"]
                values = values if isinstance(values, (tuple, list)) else [values]
                found.update(t.device.type for t in values if isinstance(t, torch.Tensor))
        assert len(inputs) == sum(node.op == "placeholder" for node in graph.graph.nodes)
        return lambda *_: None

    params = {name: p for name, p in guide.named_parameters() if p.requires_grad}
    if isinstance(optim, pyro.optim.PyroOptim):
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optim(list(params.values()))
    else:
        optim = optim(list(params.values()))
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optim.step()
    call = CALL.Call(loss, model, guide, (y,), {})
    signature = SIGNATURE.CompiledSignature(params, [y])
    signature.trace(call, [y])
    signature.build(call, lambda p: UPDATES.owner_of(optim, p), [y], 1, backend)
    return found


LOSSES = {
    "elbo": Trace_ELBO(),
    "particles": Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "mean-field": TraceMeanField_ELBO(),
    "iwae": pf.ImportanceWeightedELBO(3, "iwae", max_plate_nesting=1),
    "dreg": pf.ImportanceWeightedELBO(3, "dreg", max_plate_nesting=1),
    "stl": pf.ImportanceWeightedELBO(1, "stl", num_bounds=3, max_plate_nesting=1),
    "annealed": AnnealedELBO(Trace_ELBO(), lambda step: 0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_step_stays_on_the_device(name):
    guide = AutoNormal(model) if name == "mean-field" else pf.AutoIAF(model)
    assert devices_of_step(model, guide, LOSSES[name], on_meta(guide, Y)) == {"meta"}


def test_a_compiled_step_of_an_amortized_guide_stays_on_the_device():
    guide = amortized()
    y = on_meta(guide, Y)
    assert devices_of_step(local_model, guide, Trace_ELBO(), y) == {"meta"}


@pytest.mark.parametrize(
    "optim",
    [
        pyro.optim.Adam({"lr": 0.01}),
        pyro.optim.ClippedAdam({"lr": 0.01}),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.AdamW(params, lr=0.1),
    ],
    ids=["pyro-adam", "pyro-clipped", "sgd", "adamw"],
)
def test_a_compiled_update_stays_on_the_device(optim):
    guide = pf.AutoIAF(model)
    y = on_meta(guide, Y)
    assert devices_of_step(model, guide, Trace_ELBO(), y, optim) == {"meta"}


def test_a_tensor_on_the_cpu_is_found():
    def planted(y):
        loc = pyro.sample("loc", dist.Normal(y.new_zeros(2), y.new_ones(2)).to_event(1))
        pyro.factor("planted", (loc * torch.arange(2.0)).sum())

    guide = pf.AutoIAF(planted)
    y = on_meta(guide, Y)
    with pytest.raises(UnsupportedForCompilation, match="device"):
        devices_of_step(planted, guide, Trace_ELBO(), y)
