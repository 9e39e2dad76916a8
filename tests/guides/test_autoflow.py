"""`AutoFlow` and the guides built on it, as a user of Pyro meets them."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_guides import SHAPES, D, Y, every_guide, model, trained
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide.initialization import init_to_value

from pyro_flows_ext.guides import (
    AutoPlanar,
    AutoSylvester,
)
from pyro_flows_ext.infer import fit

LOSSES = {
    "trace": lambda: Trace_ELBO(),
    "trace-vectorized": lambda: Trace_ELBO(num_particles=5, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "mean-field": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True),
    "graph": lambda: TraceGraph_ELBO(),
    "enum": lambda: TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    "wake-sleep": lambda: ReweightedWakeSleep(num_particles=3, vectorize_particles=True),
    "jit": lambda: JitTrace_ELBO(),
}


@every_guide
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss_moves_every_parameter(guide_type, loss):
    guide = guide_type(model, 2)
    guide.setup(Y)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit warns of its end
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss())
        for _ in range(2):
            svi.step(Y)
    for name, p in guide.named_parameters():
        assert (p != before[name]).any(), name


def test_elbo_module_and_torch_optimizer():
    guide = AutoPlanar(model, 2)
    guide.setup(Y)
    loss = Trace_ELBO()(model, guide)
    assert {id(p) for p in guide.parameters()} <= {id(p) for p in loss.parameters()}
    loss(Y).backward()
    assert all(p.grad is not None for p in guide.parameters())


@every_guide
def test_samples_have_the_sites_shapes_and_supports(guide_type):
    samples = trained(guide_type).sample_posterior(50)
    assert {k: tuple(v.shape[1:]) for k, v in samples.items()} == SHAPES
    assert all(len(v) == 50 and not v.requires_grad for v in samples.values())
    assert (samples["tau"] > 0).all()
    torch.testing.assert_close(samples["p"].sum(-1), torch.ones(50))


@every_guide
def test_log_prob_is_the_density_that_svi_sees(guide_type):
    guide = trained(guide_type)
    trace = poutine.trace(guide).get_trace(Y)
    samples = {name: trace.nodes[name]["value"] for name in SHAPES}
    # Under a simplex the Delta's log-density and the auxiliary latent's add up to the constrained density.
    torch.testing.assert_close(guide.log_prob(samples), trace.log_prob_sum(), atol=1e-4, rtol=1e-4)


def test_log_prob_integrates_to_one_over_a_constrained_latent():
    def positive():
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, s), obs=torch.tensor(1.0))

    guide = AutoSylvester(positive)
    fit(positive, guide, num_steps=100, progress=False, warm_start=False, seed=0)
    grid = torch.linspace(1e-4, 60, 200_001)
    density = guide.log_prob({"s": grid}).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=0.01)


def test_log_prob_takes_any_leading_shape_and_differentiates():
    guide = trained(AutoSylvester)
    samples = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in guide.sample_posterior(6).items()}
    samples["mu"].requires_grad_()
    log_q = guide.log_prob(samples)
    assert log_q.shape == (2, 3)
    log_q.sum().backward()
    assert samples["mu"].grad.abs().min() > 0


def test_log_prob_outside_the_support_is_minus_infinity_and_harms_no_neighbour():
    guide = trained(AutoPlanar)
    samples = guide.sample_posterior(2)
    inside = guide.log_prob(samples)
    samples["tau"][0] = -1.0
    log_q = guide.log_prob(samples)
    assert log_q[0] == -torch.inf
    torch.testing.assert_close(log_q[1], inside[1])
    for p in torch.autograd.grad(log_q[1], list(guide.parameters()), allow_unused=True):
        assert p is None or p.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mu"), "expected the sites"),
        (lambda s: s.update(theta=s["theta"][:, :2]), r"samples\['theta'\]: expected shape"),
        (lambda s: s.update(mu=s["mu"][:1]), "same leading shape"),
    ],
    ids=["missing", "shape", "leading"],
)
def test_log_prob_refuses_what_does_not_fit(change, message):
    guide = AutoPlanar(model, 1)
    guide.setup(Y)
    samples = guide.sample_posterior(4)
    change(samples)
    with pytest.raises(ValueError, match=message):
        guide.log_prob(samples)


def test_quantiles_and_median_agree_with_draws():
    guide = trained(AutoSylvester, steps=100)
    draws = guide.sample_posterior(20_000)
    quantiles = guide.quantiles([0.05, 0.5, 0.95])
    median = guide.median()
    for name, shape in SHAPES.items():
        assert quantiles[name].shape == (3, *shape)
        error = (quantiles[name] - draws[name].quantile(torch.tensor([0.05, 0.5, 0.95]), 0)).abs()
        assert (error < 0.1 * draws[name].std(0)).all()
        assert ((median[name] - quantiles[name][1]).abs() < 0.1 * draws[name].std(0)).all()


@pytest.mark.slow
def test_quantiles_of_a_latent_of_many_numbers():
    def wide():
        pyro.sample("x", dist.Normal(torch.zeros(2000), 1.0).to_event(1))

    loc = torch.arange(2000.0) / 1000
    guide = AutoPlanar(wide, 1, init_loc_fn=init_to_value(values={"x": loc}))
    guide.setup()
    low, high = guide.quantiles([0.05, 0.95])["x"] - loc
    torch.testing.assert_close(high, torch.full((2000,), 0.1645), atol=0.02, rtol=0.0)
    torch.testing.assert_close(low, -high, atol=0.02, rtol=0.0)


@every_guide
def test_init_location_and_scale_are_honoured(guide_type):
    start = init_to_value(values={"mu": torch.tensor(3.0), "tau": torch.tensor(0.2)})
    guide = guide_type(model, init_loc_fn=start, init_scale=0.01)
    draws = guide.sample_posterior(2000, Y)
    assert draws["mu"].mean().item() == pytest.approx(3.0, abs=0.01)
    assert draws["mu"].std().item() == pytest.approx(0.01, rel=0.25)
    assert draws["tau"].log().std().item() == pytest.approx(0.01, rel=0.25)


def test_whiten_places_the_guide():
    guide = AutoSylvester(model)
    guide.setup(Y)
    loc, A = torch.randn(D), torch.randn(D, D)
    scale_tril = torch.linalg.cholesky(A @ A.mT + torch.eye(D))
    guide.whiten(loc, scale_tril)
    latent = guide.get_posterior().sample((40_000,))
    covariance = scale_tril @ scale_tril.mT
    error = (latent.mT.cov() - covariance).abs() / covariance.diagonal().max()
    assert error.max() < 0.1
    assert ((latent.mean(0) - loc).abs() < 0.1 * covariance.diagonal().sqrt()).all()
    with pytest.raises(ValueError, match="expected shape"):
        guide.whiten(loc[:2], scale_tril[:2, :2])


@pytest.mark.slow
@every_guide
def test_one_latent_dimension(guide_type):
    def small():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = guide_type(small)
    result = fit(small, guide, num_steps=150, lr=0.05, progress=False, warm_start=False, seed=0)
    assert result.elbo == pytest.approx(0.0, abs=0.05)


def test_dtype_follows_the_model():
    def double():
        pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))

    guide = AutoSylvester(double)
    fit(double, guide, num_steps=5, progress=False, warm_start=False)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    samples = guide.sample_posterior(2)
    assert samples["z"].dtype == guide.log_prob(samples).dtype == torch.float64
