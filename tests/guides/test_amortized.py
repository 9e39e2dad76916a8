"""`AutoAmortizedFlow`: the same posterior for a datum in whatever batch, densities and bounds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_models import (
    FLOWS,
    NOISE,
    SITES,
    W,
    linear,
    perturbed,
    several,
    simulate,
)
from amortized_models import encoder as make_encoder
from pyro import poutine
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide.initialization import init_to_value

from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.guides import amortized as amortized_module
from pyro_flows_ext.infer import ImportanceWeightedELBO, fit

every_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)

NUM_DATA = 1000
INDEX = torch.arange(1, 151, 3).flip(0)  # 50 of them
WAYS = {
    "all": (lambda x: x, {}),
    "mini-batch": (lambda x: x[INDEX], {}),
    "drawn": (lambda x: x, {"size": 50}),
    "given": (lambda x: x, {"index": INDEX}),
    "permuted": (lambda x: x, {"index": torch.arange(NUM_DATA).flip(0)}),
}


@every_flow
@pytest.mark.parametrize(("data", "kwargs"), WAYS.values(), ids=WAYS)
def test_a_datum_has_the_same_posterior_in_every_batch(flow, data, kwargs):
    x = simulate(NUM_DATA, torch.float64)
    guide = perturbed(linear, x, flow=flow)
    trace = poutine.trace(guide).get_trace(data(x), **kwargs)
    index = trace.nodes["data"]["value"]
    assert torch.equal(index, kwargs.get("index", index))
    index = INDEX if data(x) is not x else index
    trace.compute_log_prob()
    log_q = sum(
        trace.nodes[name]["unscaled_log_prob"] for name in ("_AutoAmortizedFlow_latent", "z")
    )
    # The density of the same values among all data.
    z = torch.zeros_like(x[:, :2])
    z[index] = trace.nodes["z"]["value"].detach()
    torch.testing.assert_close(guide.log_prob({"z": z}, x)[index], log_q, atol=1e-9, rtol=0)
    assert len(log_q.unique()) == len(index)
    # The model sees the same data.
    model_trace = poutine.trace(poutine.replay(linear, trace)).get_trace(data(x), **kwargs)
    assert torch.equal(model_trace.nodes["x"]["value"], x[index])
    assert model_trace.nodes["z"]["scale"] == trace.nodes["z"]["scale"] == len(data(x)) / len(index)


def test_draws_of_a_subsample_are_fresh():
    x = simulate(50)
    guide = perturbed(linear, x, dtype=torch.float32)
    draws = [poutine.trace(guide).get_trace(x, 5).nodes["data"]["value"].tolist() for _ in range(2)]
    assert draws[0] != draws[1]
    assert len(set(draws[0])) == 5


def test_rows_of_a_mini_batch_beside_a_plate_that_draws():
    """The arguments are the batch already; the plate only scales."""

    def model(x):
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.to(x).mT, NOISE).to_event(1), obs=x)

    x = simulate(12, torch.float64)
    guide = perturbed(model, x)
    for rows in (x, x[:5]):
        trace = poutine.trace(guide).get_trace(rows)
        z, log_q = trace.nodes["z"]["value"], trace.nodes["_AutoAmortizedFlow_latent"]
        torch.testing.assert_close(
            guide.log_prob({"z": z}, rows), log_q["fn"].log_prob(log_q["value"])
        )
        assert trace.nodes["z"]["scale"] == pytest.approx(100 / len(rows))


# --- densities ---


@pytest.mark.parametrize("size", [None, 5], ids=["all", "subsample"])
@pytest.mark.parametrize("particles", [0, 3], ids=["alone", "particles"])
def test_several_latents_in_and_out_of_a_plate_within_the_datum(size, particles):
    x = simulate(6, torch.float64)
    guide = perturbed(several, x, flow="iaf")
    program = guide
    if particles:
        program = pyro.plate("particles", particles, dim=-3)(guide)
    trace = poutine.trace(program).get_trace(x, size)
    trace.compute_log_prob()
    index = trace.nodes["data"]["value"]
    lead = (particles,) * bool(particles) + (len(index),)
    samples = {name: trace.nodes[name]["value"] for name in SITES}
    assert {k: tuple(v.shape) for k, v in samples.items()} == {
        k: lead + s for k, s in SITES.items()
    }
    assert all(trace.nodes[name]["scale"] == 6 / len(index) for name in SITES)
    log_q = trace.nodes["_AutoAmortizedFlow_latent"]["unscaled_log_prob"].squeeze(-1)
    log_q = log_q + sum(trace.nodes[name]["unscaled_log_prob"].sum(-1) for name in SITES)
    torch.testing.assert_close(guide.log_prob(samples, x[index]), log_q, atol=1e-8, rtol=0)
    assert (samples["tau"] > 0).all()
    assert ((samples["u"] > -1) & (samples["u"] < 2)).all()
    torch.testing.assert_close(samples["p"].sum(-1), torch.ones(*lead, 1, dtype=x.dtype))


@pytest.mark.parametrize("flow", ["planar", "sylvester", "iaf", None])
def test_log_prob_integrates_to_one_for_every_datum(flow):
    def model(x):
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample(
                "x", dist.Normal(0.0, s.unsqueeze(-1)).expand([len(x), 3]).to_event(1), obs=x
            )

    x = simulate(4, torch.float64)
    guide = perturbed(model, x, flow=flow, init_scale=0.5)
    log_s = torch.linspace(-25, 25, 20_001, dtype=torch.float64)
    s = log_s.exp().unsqueeze(-1).expand(-1, 4)
    with torch.no_grad():
        density = guide.log_prob({"s": s}, x).exp() * s
    torch.testing.assert_close(
        torch.trapezoid(density, log_s, dim=0), torch.ones(4).double(), atol=1e-4, rtol=0
    )
    outside = guide.log_prob({"s": torch.tensor([1.0, -1.0, 2.0, 3.0]).double()}, x)
    assert outside.isneginf().tolist() == [False, True, False, False]


def test_draws_for_new_data_of_any_number():
    x = simulate(20)
    guide = AutoAmortizedFlow(several, make_encoder(), flow="sylvester", init_scale=0.3)
    fit(several, guide, x, size=4, num_steps=5, num_particles=2, progress=False)
    for new in (simulate(1), simulate(33)):
        samples = guide.sample_posterior(7, new)
        assert {k: tuple(v.shape) for k, v in samples.items()} == {
            k: (7, len(new), *s) for k, s in SITES.items()
        }
        assert guide.log_prob(samples, new).shape == (7, len(new))
        assert not any(v.requires_grad for v in samples.values())


def test_quantiles_and_median_agree_with_draws_whatever_the_chunks(monkeypatch):
    x = simulate(5)
    guide = perturbed(linear, x, dtype=torch.float32)
    monkeypatch.setattr(amortized_module, "CHUNK", 50_000)  # two data at a time
    levels = torch.tensor([0.05, 0.5, 0.95])
    quantiles = guide.quantiles(levels, x)["z"]
    draws = guide.sample_posterior(20_000, x)["z"]
    assert quantiles.shape == (3, 5, 2)
    assert ((quantiles - draws.quantile(levels, 0)).abs() < 0.1 * draws.std(0)).all()
    assert ((guide.median(x)["z"] - quantiles[1]).abs() < 0.1 * draws.std(0)).all()


@every_flow
def test_the_start_is_honoured_and_hardly_a_flow(flow):
    start = init_to_value(values={"z": torch.tensor([3.0, -2.0]).expand(8, 2)})
    guide = AutoAmortizedFlow(linear, make_encoder(), flow=flow, init_loc_fn=start, init_scale=0.05)
    x = simulate(8)
    z = guide.sample_posterior(4000, x)["z"]
    torch.testing.assert_close(z.mean(0), torch.tensor([3.0, -2.0]).expand(8, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(z.std(0), torch.full((8, 2), 0.05), atol=0, rtol=0.15)


# --- bounds ---

LOSSES = {
    "trace": lambda: Trace_ELBO(),
    "trace-vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "mean-field": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "graph": lambda: TraceGraph_ELBO(),
    "enum": lambda: TraceEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False),
    "iwae": lambda: ImportanceWeightedELBO(3),
    "dreg": lambda: ImportanceWeightedELBO(3, "dreg"),
    "dreg-loop": lambda: ImportanceWeightedELBO(3, "dreg", vectorize_particles=False),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_moves_every_parameter(loss):
    x = simulate(8)
    guide = AutoAmortizedFlow(several, make_encoder(), num_layers=2)
    guide.setup(x)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    svi = SVI(several, guide, pyro.optim.Adam({"lr": 0.01}), loss())
    for _ in range(
        3
    ):  # the last layers start at zero, and hide the ones before them from the first gradient
        svi.step(x, size=4)
    for name, p in guide.named_parameters():
        assert (p != before[name]).any(), name


def test_mean_field_elbo_counts_the_map_into_the_support():
    x = simulate(5, torch.float64)
    guide = perturbed(several, x, flow="iaf")
    losses = []
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(3)
        losses.append(elbo.loss(several, guide, x))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_importance_weights_go_by_datum():
    x = simulate(6, torch.float64)
    guide = perturbed(linear, x)
    K = 4
    guide(x, size=3)  # for new shapes the model runs more often, and draws
    pyro.set_rng_seed(5)
    loss = ImportanceWeightedELBO(K, max_plate_nesting=1).loss(linear, guide, x, size=3)
    pyro.set_rng_seed(5)
    trace = poutine.trace(pyro.plate("num_particles_vectorized", K, dim=-2)(guide)).get_trace(
        x, size=3
    )
    z, rows = trace.nodes["z"]["value"], x[trace.nodes["data"]["value"]]
    log_w = dist.Normal(z @ W.to(x).mT, NOISE).log_prob(rows).sum(-1)
    log_w = log_w + dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - guide.log_prob({"z": z}, rows)
    bound = 2 * (log_w.logsumexp(0) - math.log(K)).sum()
    assert -loss == pytest.approx(bound.item(), rel=1e-9)


def scaled(x, full):
    """All data, or a mini-batch by argument, weighed for all data by hand."""
    with poutine.scale(scale=full / len(x)):
        linear(x)


BOUNDS = {
    "subsample_size": (linear, lambda x: ((x, 3), {}), Trace_ELBO),
    "poutine.scale": (scaled, lambda x: ((x[torch.randperm(12)[:3]], 12), {}), Trace_ELBO),
    "given": (linear, lambda x: ((x,), {"index": torch.randperm(12)[:3]}), Trace_ELBO),
    "importance-weighted": (linear, lambda x: ((x, 3), {}), ImportanceWeightedELBO),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "part", "bound"), BOUNDS.values(), ids=BOUNDS)
def test_the_bound_of_a_subsample_is_unbiased(model, part, bound):
    x = simulate(12, torch.float64)
    everything = (x, 12) if model is scaled else (x,)
    guide = perturbed(model, *everything, flow=None)
    elbo = bound(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    with pyro.validation_enabled(False):
        full = torch.tensor([elbo.loss(model, guide, *everything) for _ in range(100)])
        parts = []
        for _ in range(400):
            args, kwargs = part(x)
            parts.append(elbo.loss(model, guide, *args, **kwargs))
    parts = torch.tensor(parts)
    error = math.hypot(full.std() / 10, parts.std() / 20)
    assert error < 0.05 * full.mean().abs()
    assert (parts.mean() - full.mean()).abs() < 3 * error


def test_scale_and_mask_in_the_model_hold_in_the_guide():
    mask = torch.tensor([True, False, True, True])

    def model(x):
        with poutine.scale(scale=0.3), pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W.to(x).mT, NOISE).to_event(1), obs=x)

    x = simulate(4, torch.float64)
    guide = perturbed(model, x)
    trace = poutine.trace(guide).get_trace(x)
    z = trace.nodes["z"]["value"]
    expected = 0.3 * guide.log_prob({"z": z}, x)[mask].sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
