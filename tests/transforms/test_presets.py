"""Flows by name: what they are made of, that they start simple, that they compile."""

import copy
import shutil

import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext.transforms as T
from pyro_flows_ext.testing import perturb

PRESETS = {
    "nice": T.nice,
    "realnvp": T.realnvp,
    "glow": T.glow_vector,
    "nsf": T.nsf,
    "nsf-ar": lambda D, **options: T.nsf(D, kind="autoregressive", **options),
    "maf": T.maf,
    "iaf": T.iaf,
    "residual": T.residual,
}
# How many layers one step has, how many fewer the last one has, and how many come after the last one.
LAYERS = {"glow": (3, 0), "nsf": (2, -1), "nsf-ar": (2, -1), "residual": (2, 0), "nice": (1, 1)}
EACH = pytest.mark.parametrize("name", PRESETS)


def made(name, dim=3, **options):
    """A small preset at perturbed parameters; the residual flow's log-det is exact in eval mode."""
    options = {"num_layers": 2, "hidden_dims": (8,)} | options
    return perturb(PRESETS[name](dim, **options).double()).eval()


@EACH
@pytest.mark.parametrize("context_dim", [0, 2], ids=["plain", "context"])
def test_layers_can_be_reached(name, context_dim):
    flow = PRESETS[name](3, num_layers=3, hidden_dims=(8,), context_dim=context_dim)
    step, rest = LAYERS.get(name, (1, 0))
    assert len(flow) == 3 * step + rest
    assert isinstance(flow, T.ComposeFlow)
    assert flow.context_dim == context_dim
    assert list(flow)[1] is flow[1]
    assert repr(flow).count("\n  (") == len(flow)


@EACH
def test_starts_at_the_identity(name):
    """Up to the reflections that a stack may make of a symmetric base."""
    torch.manual_seed(0)
    flow, x = PRESETS[name](3, num_layers=4).eval(), torch.randn(5, 3)
    y, ladj = flow.forward_and_ladj(x)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(ladj, torch.zeros(5), rtol=0, atol=1e-5)


@EACH
@pytest.mark.parametrize("dim", [2, 5])
def test_every_output_depends_on_every_input(name, dim):
    """Three layers are enough: halves and orders alternate."""
    torch.manual_seed(0)
    flow = made(name, dim, num_layers=3)
    points = torch.randn(20, dim, dtype=torch.float64)
    J = torch.func.vmap(torch.func.jacrev(lambda x: flow.forward_and_ladj(x)[0]))(points)
    assert (J != 0).any(0).all()


@EACH
def test_round_trip_and_log_det(name):
    torch.manual_seed(0)
    flow, x = made(name, 4), torch.randn(6, 4, dtype=torch.float64)
    y, ladj = flow.forward_and_ladj(x)
    back, inverse_ladj = flow.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=0, atol=1e-9)
    J = torch.func.vmap(torch.func.jacrev(lambda x: flow.forward_and_ladj(x)[0]))(x)
    torch.testing.assert_close(torch.linalg.slogdet(J)[1], ladj, rtol=0, atol=1e-9)


@EACH
def test_context_by_row(name):
    """A batch of contexts is the transforms of the single contexts, row by row."""
    torch.manual_seed(0)
    flow = made(name, context_dim=2)
    x, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    bound = flow.condition(context)
    assert bound.batch_shape == (4,)
    y, ladj = bound.forward_and_ladj(x)
    for i in range(4):
        row = flow.condition(context[i]).forward_and_ladj(x[i])
        torch.testing.assert_close(row, (y[i], ladj[i]))
    assert not torch.allclose(y, flow.condition(context + 1).forward_and_ladj(x)[0])


@EACH
def test_parameters_are_not_shared_by_layers(name):
    flow = PRESETS[name](3, num_layers=3)
    single = sum(p.numel() for part in flow for p in part.parameters())
    assert sum(p.numel() for p in flow.parameters()) == single


def test_maf_and_iaf_are_each_other_turned_round():
    torch.manual_seed(0)
    iaf, maf = made("iaf"), made("maf")
    for there, here in zip(maf, reversed(list(iaf)), strict=True):
        there.transform.load_state_dict(here.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(maf.forward_and_ladj(x), iaf.inverse_and_ladj(x))


@pytest.mark.parametrize("name", ["nsf", "maf", "iaf", "residual", "nsf-ar"])
def test_one_dimension(name):
    flow, x = made(name, 1), torch.randn(5, 1, dtype=torch.float64)
    torch.testing.assert_close(flow.inv(flow(x).clone()), x)


@pytest.mark.parametrize("name", ["nice", "realnvp", "glow"])
def test_one_dimension_is_refused_by_couplings(name):
    with pytest.raises(ValueError, match="needs two elements at least"):
        PRESETS[name](1)


@EACH
@pytest.mark.parametrize("num_layers", [0, -1, 1.5])
def test_number_of_transforms_is_checked(name, num_layers):
    with pytest.raises(ValueError, match="num_layers: expected a positive integer"):
        PRESETS[name](3, num_layers=num_layers)


def test_kind_is_checked():
    with pytest.raises(ValueError, match="kind: expected one of coupling, autoregressive"):
        T.nsf(3, kind="linear")


def test_options_reach_the_layers():
    flow = T.nsf(3, num_layers=2, num_bins=4, bound=2.0, mask="alternating", linear=False)
    assert [layer.transformer.num_bins for layer in flow] == [4, 4]
    assert [layer.transformer.bound for layer in flow] == [2.0, 2.0]
    assert flow[0].mask.tolist() == [True, False, True]
    assert flow[1].mask.tolist() == [False, True, False]


@pytest.mark.slow
@EACH
def test_learns_a_scaled_and_shifted_density(name):
    """The likelihood of correlated data comes within .1 nats of the truth."""
    torch.manual_seed(0)
    truth = dist.MultivariateNormal(
        torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])
    )
    data = truth.sample((512,))
    transform = PRESETS[name](2, num_layers=2, hidden_dims=(16,))
    # A residual flow is fast from the base; for data it is turned round.
    transform = transform.inv.eval() if name == "residual" else transform
    flow = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [transform])
    optimizer = torch.optim.Adam(transform.parameters(), lr=0.02)
    gap = truth.log_prob(data).mean()
    for _ in range(250):
        optimizer.zero_grad()
        loss = -flow.log_prob(data).mean()
        loss.backward()
        optimizer.step()
    assert loss + gap < 0.1


@EACH
def test_copies_score_alike(name):
    flow, y = made(name), torch.randn(4, 3, dtype=torch.float64)
    x, ladj = flow.inverse_and_ladj(y)
    flow(x)
    torch.testing.assert_close(copy.deepcopy(flow).inverse_and_ladj(y), (x, ladj))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor calls what torch has deprecated
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@EACH
@pytest.mark.parametrize("method", ["forward_and_ladj", "inverse_and_ladj"])
def test_compiles_with_inductor(name, method):
    """Value, log-det and gradient, in one graph."""
    torch.manual_seed(0)
    flow, x = made(name, 2), torch.randn(6, 2, dtype=torch.float64)
    compiled = torch.compile(getattr(flow, method), fullgraph=True, backend="inductor")

    def value_and_gradient(function):
        flow.zero_grad()
        y, ladj = function(x)
        (y.sin().sum() + (ladj * torch.arange(6)).sum()).backward()
        return y.detach(), ladj.detach(), [p.grad for p in flow.parameters()]

    torch.testing.assert_close(
        value_and_gradient(compiled),
        value_and_gradient(getattr(flow, method)),
        rtol=1e-8,
        atol=1e-8,
    )
