"""Nested dropout: projections in order, the penalty written out, the paper's optimum for a Gaussian."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_flows_ext.distributions.ordered import NestedDropoutFlow
from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    ComposeFlow,
    ElementwiseAffine,
    QRLinear,
    affine_autoregressive,
    realnvp,
)

D = 3


def make(**options):
    base = dist.Normal(torch.zeros(D), 1.0)
    return perturb(NestedDropoutFlow(base, realnvp(D, num_layers=2), **options).double())


def data(num=20):
    return torch.randn(num, D, dtype=torch.float64)


@pytest.mark.parametrize("order", [None, [2, 0, 1]], ids=["own", "given"])
def test_projection_keeps_the_first_in_order(order):
    flow, x = make(order=order), data()
    z = flow.transform.inv(x)
    kept = list(range(D)) if order is None else order
    for k in range(D + 1):
        projected = flow.project(x, k)
        torch.testing.assert_close(projected[:, kept[:k]], z[:, kept[:k]])
        assert (projected[:, kept[k:]] == 0).all()
        torch.testing.assert_close(flow.reconstruct(x, k), flow.transform(projected))
    torch.testing.assert_close(flow.reconstruct(x, D), x)


def test_one_index_a_row():
    flow, x = make(), data(3)
    k = torch.tensor([0, 2, 3])
    rows = torch.stack([flow.reconstruct(row, int(i)) for row, i in zip(x, k, strict=True)])
    torch.testing.assert_close(flow.reconstruct(x, k), rows)
    torch.testing.assert_close(flow.penalty(x, k), 20 * (rows - x).square().sum(-1))


@pytest.fixture
def passes(monkeypatch):
    """How often the flow ran forward and backward."""
    counts = {"forward_and_ladj": 0, "inverse_and_ladj": 0}
    for name in counts:
        original = getattr(ComposeFlow, name)

        def counting(self, x, name=name, original=original):
            counts[name] += 1
            return original(self, x)

        monkeypatch.setattr(ComposeFlow, name, counting)
    return counts


def test_the_objective_takes_one_pass_each_way(passes):
    flow, x = make(), data()
    k = torch.randint(1, D + 1, (20,))
    found = flow.objective(x, k)
    assert list(passes.values()) == [1, 1]
    torch.testing.assert_close(found, flow.log_prob(x) - flow.penalty(x, k))
    assert (found != flow.log_prob(x)).any()
    flow.reconstruction_weight = 0.0
    passes.update(forward_and_ladj=0, inverse_and_ladj=0)
    torch.testing.assert_close(flow.objective(x), flow.log_prob(x))
    assert list(passes.values()) == [0, 2]  # one of them for the comparison


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_step_with_observe_takes_one_pass_each_way(num_particles, passes):
    flow, x = make(), data(10)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", 10, subsample_size=4) as i:
            flow.observe("x", x[i])

    elbo = Trace_ELBO(num_particles, 1, vectorize_particles=num_particles > 1)
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), elbo)
    svi.step(x)
    before = [p.clone() for p in flow.parameters()]
    passes.update(forward_and_ladj=0, inverse_and_ladj=0)
    svi.step(x)
    assert list(passes.values()) == [1, 1]
    assert all((p != q).any() for p, q in zip(flow.parameters(), before, strict=True))


def test_curve_is_the_mean_squared_error():
    flow, x = make(), data()
    curve = flow.reconstruction_curve(x, chunk_size=7)
    expected = torch.stack([(flow.reconstruct(x, k) - x).square().mean() for k in (1, 2, 3)])
    torch.testing.assert_close(curve, expected)
    torch.testing.assert_close(flow.reconstruction_curve(x, [2]), expected[1:2])


def test_curve_inverts_each_chunk_once(passes):
    flow, x = make(), data()
    flow.reconstruction_curve(x, [1, 2], chunk_size=10)
    assert passes == {"forward_and_ladj": 4, "inverse_and_ladj": 2}


def test_indices_are_geometric_from_one_and_cut_at_the_dimension():
    flow = make(index_prob=0.4)
    k = flow.sample_index((100_000,))
    shares = torch.stack([(k == i).double().mean() for i in (1, 2, 3)])
    torch.testing.assert_close(shares, torch.tensor([0.4, 0.24, 0.36]).double(), rtol=0, atol=0.01)
    assert k.min() == 1


def test_observe_adds_the_penalty_with_the_scale_of_the_plate(monkeypatch):
    flow, x = make(), data(10)
    monkeypatch.setattr(flow, "sample_index", lambda shape: torch.ones(shape, dtype=torch.long))

    def model():
        pyro.module("flow", flow)
        with pyro.plate("data", 10, subsample_size=4) as i:
            flow.observe("x", x[i])

    trace = poutine.trace(model).get_trace()
    rows = x[trace.nodes["data"]["value"]]
    one = torch.ones(4, dtype=torch.long)
    expected = 10 / 4 * (flow.log_prob(rows) - flow.penalty(rows, one)).sum()
    torch.testing.assert_close(torch.as_tensor(trace.log_prob_sum()), expected)
    assert torch.equal(trace.nodes["x"]["fn"].log_prob(rows), flow.log_prob(rows))


def test_truncated_draws_lie_on_the_manifold():
    flow = NestedDropoutFlow(
        dist.Normal(torch.zeros(D), 1.0), [ElementwiseAffine(D), QRLinear(D, bias=False)]
    )
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
        flow.transform[0].loc.zero_()
    draws = flow.expand((2,)).sample_truncated(1, (50,))
    assert draws.shape == (50, 2, D)
    assert torch.linalg.matrix_rank(draws.reshape(-1, D), tol=1e-4) == 1


@pytest.mark.slow
def test_a_linear_flow_finds_the_principal_components():
    """MSE(1) and MSE(2) of the best one- and two-dimensional subspaces, and the likelihood of the exact density."""
    torch.manual_seed(0)
    scales = torch.tensor([1.0, 0.1, 0.01]).sqrt()
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    x = torch.randn(4000, 3) * scales @ rotation.T
    flow = NestedDropoutFlow(
        dist.Normal(torch.zeros(D), 1.0), QRLinear(D, num_reflections=3, bias=False)
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        rows = x[torch.randint(len(x), (250,))]
        optimizer.zero_grad()
        (-flow.objective(rows).mean()).backward()
        optimizer.step()
        schedule.step()
    variances = torch.linalg.eigvalsh(x.T @ x / len(x))
    best = torch.stack([variances[:2].sum(), variances[0]]) / 3
    torch.testing.assert_close(flow.reconstruction_curve(x, [1, 2]), best, rtol=0.05, atol=2e-4)
    exact = dist.MultivariateNormal(torch.zeros(3), x.T @ x / len(x))
    assert flow.log_prob(x).mean() > exact.log_prob(x).mean() - 0.02


def test_refusals_and_the_warning():
    with pytest.raises(ValueError, match="index_prob"):
        make(index_prob=1.0)
    with pytest.raises(ValueError, match="reconstruction_weight"):
        make(reconstruction_weight=-1.0)
    with pytest.raises(ValueError, match="each of 0 to 2 once"):
        make(order=[0, 0, 1])
    with pytest.raises(ValueError, match="from 0 to 3"):
        make().project(data(), 4)
    with pytest.raises(ValueError, match="without a context"):
        NestedDropoutFlow(dist.Normal(torch.zeros(D), 1.0), realnvp(D, context_dim=2))
    with pytest.warns(UserWarning, match="up to 3 sweeps"):
        NestedDropoutFlow(dist.Normal(torch.zeros(D), 1.0), affine_autoregressive(D))
