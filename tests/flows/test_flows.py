"""Densities by name: every one scores, draws, copies and trains, with and without a context."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows_ext as pf
from pyro_flows_ext.flows import FLOWS, make
from pyro_flows_ext.testing import perturb

SMALL = {"num_layers": 1}
# One linear layer, without a number of layers.
LINEAR = ("nested-qr", "nested-lu")
WITHOUT_CONTEXT = ("cif", "nested", "flow-vae")


def small(name, **options):
    kind = FLOWS[name]
    options = {**({} if name in LINEAR else SMALL), **options}
    return kind((1, 4, 4) if kind.of_images else 3, **options)


def perturbed(density):
    return perturb(density, scale=0.1).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_scores_and_draws(name, dtype):
    density = perturbed(small(name).to(dtype))
    x = density.sample((5,))
    assert x.shape == (5, *density.event_shape)
    values = density.log_prob(x)
    assert values.shape == (5,)
    assert x.dtype == values.dtype == dtype
    assert values.isfinite().all()
    (-values.mean()).backward()
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in density.parameters())


@pytest.mark.parametrize("name", [n for n in FLOWS if not n.startswith(WITHOUT_CONTEXT)])
def test_a_context_changes_the_density(name):
    density = perturbed(small(name, context_dim=2).double())
    assert tuple(density.event_shape) == ((1, 4, 4) if FLOWS[name].of_images else (3,))
    assert density.context_dim == 2
    at = density.condition(torch.randn(5, 2).double())
    x = at.sample()
    assert x.shape == (5, *density.event_shape)
    together = at.log_prob(x)
    by_row = [density.condition(c).log_prob(v) for c, v in zip(at.context, x, strict=True)]
    torch.testing.assert_close(together, torch.stack(by_row))
    assert not torch.allclose(density.condition(torch.zeros(2).double()).log_prob(x), together)


@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_is_copied(name):
    density = perturbed(small(name))
    x = density.sample((4,))
    loaded = make(density.recipe).eval()
    loaded.load_state_dict(density.state_dict())
    for one in (copy.deepcopy(density), loaded, pickle.loads(pickle.dumps(density))):
        torch.manual_seed(0)
        expected = density.log_prob(x)
        torch.manual_seed(0)
        torch.testing.assert_close(one.log_prob(x), expected, rtol=0, atol=0)
        assert one.recipe == density.recipe


@pytest.mark.parametrize("name", FLOWS)
def test_the_number_of_layers_is_that_of_the_recipe(name):
    flow = FLOWS[name]
    if flow.num_layers is None:
        assert name in LINEAR
        return
    shape = (1, 8, 8) if flow.of_images else 2

    def size(density):
        return sum(p.numel() for p in density.parameters())

    assert size(flow(shape)) == size(flow(shape, num_layers=flow.num_layers))
    assert size(flow(shape)) > size(flow(shape, num_layers=1))


def test_a_density_of_angles_is_one_of_the_circle():
    """It integrates to 1, is continuous across ±π, and learns the density of a von Mises distribution."""
    density = perturb(FLOWS["circular-nsf"](1, num_layers=2).double(), scale=1.0).eval()
    grid = -math.pi + 2 * math.pi * (torch.arange(4000.0).double() + 0.5)[:, None] / 4000
    p = density.log_prob(grid).exp()
    assert p.mean().item() * 2 * math.pi == pytest.approx(1, abs=1e-3)
    assert p.max() > 1.5 * p.min()
    ends = torch.tensor([[-math.pi], [math.pi - 1e-9]], dtype=torch.float64)
    torch.testing.assert_close(*density.log_prob(ends), rtol=0, atol=1e-5)
    truth = dist.VonMises(3.0, 2.0)
    data = truth.sample((4000,))[:, None]
    data = pf.ops.wrap(data)
    fitted = pf.flows.CircularNSF(1, num_layers=1)
    pf.fit_density(fitted, data, num_steps=300, lr=0.02, seed=0, progress=False)
    grid = grid.float()
    gap = (truth.log_prob(grid[:, 0]).exp() - fitted.log_prob(grid).exp()).abs().mean()
    assert gap.item() * 2 * math.pi < 0.12


def test_angles_depend_on_one_another():
    """y = x + noise on the torus: the conditional density of y follows x across ±π."""
    x = 2 * math.pi * torch.rand(4000) - math.pi
    y = pf.ops.wrap(x + 0.3 * torch.randn(4000))
    density = pf.flows.CircularNSF(2, num_layers=2)
    pf.fit_density(density, torch.stack([x, y], -1), num_steps=800, lr=0.01, seed=0, progress=False)
    entropy = math.log(2 * math.pi) + math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e)
    found = -density.log_prob(torch.stack([x, y], -1)).mean().item()
    assert found < entropy + 0.1
    near = density.sample((2000,))
    assert pf.ops.wrap(near[:, 1] - near[:, 0]).std().item() == pytest.approx(0.3, abs=0.06)


def test_other_angles_are_refused():
    with pytest.raises(ValueError, match="within the support"):
        pf.flows.CircularNSF(2).log_prob(torch.tensor([4.0, 0.0]))
    with pytest.raises(ValueError, match="standardize: expected a density of all real numbers"):
        pf.flows.CircularNSF(2).standardize(torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize("name", ["nsf", "maf", "realnvp", "planar"])
def test_the_density_of_a_planted_base(name):
    """At the start every flow is near the identity, so that the density is that of the base."""
    base = dist.Laplace(torch.tensor([1.0, -2.0]), 0.5).to_event(1)
    density = FLOWS[name](2, base=base, num_layers=1).eval()
    x = base.sample((50,))
    assert (density.log_prob(x) - base.log_prob(x)).abs().max() < 0.3


def test_a_base_that_learns():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self):
            return dist.Normal(self.loc, 1.0).to_event(1)

    density = pf.flows.RealNVP(2, base=Learned(), num_layers=1)
    density.log_prob(torch.ones(3, 2)).sum().backward()
    assert density.base.loc.grad.abs().min() > 0
    assert density.recipe.unsaved == ["base"]


@pytest.mark.parametrize("name", ["NSF", "MAF", "IAF", "Residual", "Planar", "Radial", "Sylvester"])
def test_one_dimension(name):
    density = getattr(pf.flows, name)(1, num_layers=2).eval()
    assert density.log_prob(density.sample((4,))).isfinite().all()


def test_a_flow_is_a_pyro_distribution():
    density = pf.flows.NSF(2, num_layers=1)

    def model(x):
        pyro.module("density", density)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", density, obs=x)

    trace = pyro.poutine.trace(model).get_trace(torch.zeros(6, 2))
    assert trace.nodes["x"]["fn"].log_prob(torch.zeros(6, 2)).shape == (6,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.NSF((1, 4, 4)), r"event_shape: expected D or \(D,\).*Glow"),
        (lambda f: f.NSF(2.0), r"event_shape: expected D or \(D,\).*got 2.0"),
        (lambda f: f.NSF(0), "event_shape: expected a positive integer, got 0"),
        (lambda f: f.Glow(4), r"event_shape: expected \(C, H, W\), got 4; NSF"),
        (lambda f: f.Glow((1, 3, 3)), "H and W divisible by 2, got"),
        (lambda f: f.NSF(3, context_dim=-1), "context_dim: expected an integer >= 0, got -1"),
        (lambda f: f.NSF(3, num_layers=0), "num_layers: expected a positive integer, got 0"),
        (lambda f: f.NSF(3, kind="ar"), "kind: expected one of coupling, autoregressive"),
        (lambda f: f.MAF(3, base=dist.Normal(torch.zeros(2), 1.0)), r"base: expected .* \(3,\)"),
        (lambda f: f.CIF((1, 4, 4), flow="maf"), "flow: expected glow, realnvp or residual"),
        (lambda f: f.CIF(3, flow="no"), "flow: expected one of nsf, .*; got 'no'"),
        (lambda f: f.NestedDropout(3, num_layers=2), "which is one linear layer, got 2"),
        (lambda f: f.Planar(3, hidden_dims=(8,)), "hidden_dims: expected None where context_dim"),
        (lambda f: f.RealNVP(1), "a coupling layer needs two elements at least"),
        (lambda f: f.NSF(3, context_dim=2).log_prob(torch.zeros(3)), "depends on a context"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(pf.flows)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="num_bin"):
        pf.flows.NSF(3, num_bin=4)
    with pytest.raises(ValueError, match=r"recipe: .*'depth'"):
        make(pf.flows.Recipe("NSF", {"event_shape": 3, "depth": 2}))
    with pytest.raises(ValueError, match=r"recipe: expected one of NSF.*got 'os\.system'"):
        make(pf.flows.Recipe("os.system"))


@pytest.mark.parametrize("flow", ["glow", "realnvp", "residual", None])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_indexed_flows_of_images(flow, context_dim):
    density = pf.flows.CIF((1, 4, 4), context_dim, 2, (4, 4), flow=flow, index_dim=2)
    x = torch.randn(3, 1, 4, 4)
    at = density.condition(torch.randn(3, context_dim)) if context_dim else density
    assert at.log_prob_bound(x, 2).isfinite().all()
    assert at.sample().shape[-3:] == (1, 4, 4)
    assert len(density.layers) == 2
    again = make(density.recipe)
    assert [p.shape for p in again.parameters()] == [p.shape for p in density.parameters()]
