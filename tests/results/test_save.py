"""Densities and guides written by `save` and read by `load`."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows_ext as pf
from pyro_flows_ext.distributions import Dequantized
from pyro_flows_ext.flows import FLOWS
from pyro_flows_ext.testing import perturb


@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_is_saved_and_read(name: str, tmp_path: Path) -> None:
    shape = (1, 4, 4) if FLOWS[name].of_images else (3,)
    num_layers = None if FLOWS[name].num_layers is None else 1
    density = perturb(FLOWS[name](shape, num_layers=num_layers), scale=0.1).double().eval()
    if name != "circular-nsf":
        density.standardize(torch.full(shape, 5.0), torch.full(shape, 2.0))
    file = tmp_path / "new" / "flow.pt"
    pf.save(density, file, columns=["a", "b", "c"])
    before = torch.get_rng_state()
    saved = pf.load(file)
    assert torch.equal(torch.get_rng_state(), before)
    assert (saved.columns, saved.context_columns, saved.target) == (("a", "b", "c"), None, None)
    results = []
    for one in (density, saved.density):
        torch.manual_seed(0)
        x = one.sample((6,))
        assert x.dtype == torch.float64
        results.append(torch.cat([x.flatten(), one.log_prob(x)]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not saved.density.training
    assert not any(part.training for part in saved.density.modules())


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_whole_numbers(kind: str, tmp_path: Path) -> None:
    flow = pf.flows.Glow((1, 4, 4), num_layers=1)
    density = perturb(
        Dequantized(flow, kind, num_levels=17, logit_alpha=0.01, hidden_dims=(5,)), scale=0.1
    )
    pf.save(density.eval(), tmp_path / "digits.pt")
    loaded = pf.load(tmp_path / "digits.pt").density
    x = torch.randint(0, 17, (5, 1, 4, 4)).float()
    torch.manual_seed(0)
    expected = density.log_prob(x)
    torch.manual_seed(0)
    torch.testing.assert_close(loaded.log_prob(x), expected, rtol=0, atol=0)
    assert (loaded.num_levels, loaded.kind) == (17, kind)


def test_a_fit_is_saved_with_its_columns_and_units(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = pd.DataFrame({"age": generator.normal(50, 10, 300)})
    y = pd.DataFrame({"dose": 1e4 * x["age"] + generator.normal(0, 1e3, 300), "time": x["age"]})
    y["time"] += generator.normal(0, 1, 300)
    density = pf.flows.NSF(2, context_dim=1, num_layers=1)
    result = pf.fit_density(density, y, context=x, num_steps=5, progress=False, standardize=True)
    pf.save(result, tmp_path / "fit.pt")
    saved = pf.load(tmp_path / "fit.pt")
    assert saved.columns == ("dose", "time")
    assert saved.context_columns == ("age",)
    rows = torch.tensor(y.to_numpy()[:5]).float()
    at = torch.tensor(x.to_numpy()[:5]).float()
    expected = density.condition(at).log_prob(rows)
    torch.testing.assert_close(saved.density.condition(at).log_prob(rows), expected, rtol=0, atol=0)


def model(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(-1), 1.0), obs=y)


Y = torch.tensor([1.5, 2.5])


def test_a_guide_and_a_fit(tmp_path: Path) -> None:
    guide = pf.AutoIAF(model, num_layers=1, hidden_dims=(8,))
    result = pf.fit(model, guide, Y, num_steps=3, progress=False, warm_start=False)
    for name, what in (("guide", guide), ("result", result)):
        pf.save(what, tmp_path / f"{name}.pt")
        saved = pf.load(tmp_path / f"{name}.pt")
        assert (saved.target, saved.data_digest) == ("model", None)
        pyro.clear_param_store()
        with pytest.raises(ValueError, match=r"expected a new AutoIAF .* got the model alone"):
            saved.rebuild(model, Y)
        with pytest.raises(
            ValueError,
            match=r"expected a new AutoIAF made as the saved one was, .* with other parameters",
        ):
            saved.rebuild(pf.AutoIAF(model), Y)
        loaded = saved.rebuild(pf.AutoIAF(model, num_layers=1, hidden_dims=(8,)), Y)
        draws = []
        for one in (guide, loaded):
            pyro.clear_param_store()
            torch.manual_seed(3)
            draws.append(one(Y)["mu"])
        torch.testing.assert_close(*draws, rtol=0, atol=0)


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    by_hand = pf.FlowDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), pf.transforms.nsf(2)
    )
    with pytest.raises(ValueError, match=r"expected one that a function of flows made.*state_dict"):
        pf.save(by_hand, file)
    wide = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    with pytest.raises(ValueError, match="FlowDistribution with base given"):
        pf.save(pf.flows.NSF(2, base=wide), file)
    changed = pf.flows.RealNVP(2, num_layers=1)
    changed.transform[0].net = nn.Linear(1, 2)
    with pytest.raises(ValueError, match="expected one as RealNVP makes it, got other parameters"):
        pf.save(changed, file)
    bound = pf.flows.NSF(2, context_dim=1).condition(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"not conditioned, got batch shape \(3,\)"):
        pf.save(bound, file)
    with pytest.raises(ValueError, match="never called"):
        pf.save(pf.AutoIAF(model), file)
    with pytest.raises(TypeError, match="expected a density, a guide or a result"):
        pf.save(nn.Linear(1, 1), file)
    assert not file.exists()
    torch.save({"format": "pyro_flows_ext density", "version": 99}, file)
    with pytest.raises(ValueError, match="version 99, and this release reads 2: install a newer"):
        pf.load(file)
    bad = {"made": [{"name": "NSF", "arguments": {"nope": 1}}], "columns": None, "state": {}}
    torch.save({"format": "pyro_flows_ext density", "version": 2, **bad}, file)
    with pytest.raises(ValueError, match="its entries do not fit"):
        pf.load(file)
