"""Inference gaps against Kullback-Leibler divergences in closed form, and against quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_flows_ext.diagnostics.gaps import gaps
from pyro_flows_ext.guides import AutoAmortizedFlow
from pyro_flows_ext.transforms import LULinear, iaf

W = torch.tensor([[1.0, 0.8], [0.0, 0.6], [1.0, 1.0]], dtype=torch.float64)
SD = 0.5
X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# z ~ N(0, I), x ~ N(W z, .5² I): z | x ~ N(m(x), P⁻¹), correlated.
P = torch.eye(2, dtype=torch.float64) + W.T @ W / SD**2
POSTERIOR = dist.MultivariateNormal(X @ W @ torch.linalg.inv(P) / SD**2, precision_matrix=P)
COVARIANCE = W @ W.T + SD**2 * torch.eye(3, dtype=torch.float64)
EVIDENCE = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), COVARIANCE).log_prob(X)
# The best factorised Gaussian has the precisions P_ii: KL = ½ (Σ log P_ii - log det P).
FACTORISED_KL = (P.diagonal().log().sum() - torch.logdet(P)) / 2
FEW = {"num_samples": 500, "ais_chains": 4, "ais_steps": 20}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.T, SD).to_event(1), obs=x)


def wrong():
    """Half of the way to the posterior's means, a shift, and the same sds for all."""
    loc = 0.5 * POSTERIOR.mean + 0.2
    return dist.Normal(loc, torch.tensor([0.3, 0.5], dtype=torch.float64))


def wrong_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", wrong().to_event(1))


@pytest.mark.slow
def test_against_closed_forms():
    result = gaps(
        model,
        wrong_guide,
        X,
        flow=LULinear,
        num_samples=4000,
        max_steps=500,
        chunk_size=1500,
        ais_chains=32,
        ais_steps=40,
    )
    covariance = torch.diag_embed(wrong().scale.square())
    total = kl_divergence(dist.MultivariateNormal(wrong().loc, covariance), POSTERIOR)
    # Standard errors over 4000 draws: .06 for the wrong guide's ELBO, .015 for a local Gaussian's.
    assert result.best == "IWAE flow"
    assert (result.log_evidence - EVIDENCE).abs().max() < 0.01
    assert (EVIDENCE - result.amortized - total).abs().max() < 0.3
    assert (EVIDENCE - result.gaussian - FACTORISED_KL).abs().max() < 0.08
    assert (EVIDENCE - result.flow).abs().max() < 0.03
    for name in ("AIS", "IWAE flow"):  # weights of the Gaussian have no variance
        error = (result.evidence[name] - EVIDENCE).abs()
        assert (error < 4.5 * result.evidence_se[name] + 1e-4).all(), name

    total, factorised = total.mean().item(), FACTORISED_KL.item()
    assert result.total_gap().mean == pytest.approx(total, abs=0.1)
    assert result.approximation_gap("gaussian").mean == pytest.approx(factorised, abs=0.04)
    assert result.amortization_gap("gaussian").mean == pytest.approx(total - factorised, abs=0.1)
    assert result.approximation_gap("flow").mean == pytest.approx(0.0, abs=0.02)
    assert result.amortization_gap("flow").mean == pytest.approx(total, abs=0.1)
    for family in ("gaussian", "flow"):
        parts = result.approximation_gap(family).mean + result.amortization_gap(family).mean
        assert parts == pytest.approx(result.total_gap().mean, abs=1e-9)
    assert result.total_gap().se == pytest.approx(
        (result.log_evidence - result.amortized).std().item() / 8**0.5
    )
    text = str(result)
    assert result.fits["gaussian"].converged
    assert "approximation gap" in text
    assert f"by {result.best}" in text
    assert f"{result.fits['flow'].steps} steps" in text


@pytest.mark.slow
def test_the_posterior_itself_has_no_gaps():
    """A factorised posterior: weights are constant, and every estimate is exact."""

    def factorised(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    result = gaps(factorised, guide, X, **FEW, max_steps=250, ais_start="gaussian")
    evidence = dist.Normal(0.0, 2**0.5).log_prob(X).sum(-1)
    torch.testing.assert_close(result.amortized, evidence)
    torch.testing.assert_close(result.evidence["IWAE guide"], evidence)
    for name in ("AIS", "IWAE gaussian"):
        torch.testing.assert_close(result.evidence[name], evidence, rtol=0.0, atol=1e-2)
    assert abs(result.approximation_gap("gaussian").mean) < 1e-2
    assert abs(result.amortization_gap("gaussian").mean) < 1e-2
    assert abs(result.approximation_gap("flow").mean) < 0.03


def skewed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 4.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def skewed_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + 0.1).log() - 1.0, 1.5))


@pytest.mark.slow
def test_one_skewed_latent_by_quadrature():
    x = torch.tensor([0.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    z = torch.linspace(-40.0, 8.0, 20_001, dtype=torch.float64).unsqueeze(-1)
    log_joint = dist.Normal(0.0, 4.0).log_prob(z) + dist.Poisson(z.exp()).log_prob(x)
    evidence = torch.trapezoid(log_joint.exp(), z, dim=0).log()
    result = gaps(
        skewed, skewed_guide, x, num_samples=4000, max_steps=500, ais_chains=256, ais_steps=30
    )
    assert (result.evidence["AIS"] - evidence).abs().max() < 0.4
    # At x = 0 the posterior is the prior, cut off on the right: skewed.
    assert (result.log_evidence - evidence).abs().max() < 0.03
    assert (evidence - result.gaussian)[:2].min() > 0.08
    assert (evidence - result.flow).mean() < 0.5 * (evidence - result.gaussian).mean()


# --- guides and models of other forms ---


@pytest.mark.slow
def test_amortized_flow_under_a_subsampled_plate():
    """One subsample for everything; the amortized bound is Pyro's, on the mean of a datum."""

    def local(x, size):
        with pyro.plate("data", len(x), subsample_size=size) as index:
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            noise = scale.unsqueeze(-1).expand(*scale.shape, 3)
            pyro.sample("x", dist.Normal(z @ W.T.float(), noise).to_event(1), obs=x[index])

    x = X.float()
    guide = AutoAmortizedFlow(local, nn.Linear(3, 4), flow="planar", num_layers=2)
    guide.setup(x, 8)
    options = {**FEW, "max_steps": 20, "ais_steps": 3}
    result = gaps(local, guide, x, 8, **options)
    loss = Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=1).loss(local, guide, x, 8)
    assert result.amortized.sum().item() == pytest.approx(-loss, rel=0.02)
    assert result.amortization_gap("gaussian").mean > 0.5  # the guide starts narrow
    assert not result.fits["flow"].converged
    assert "still rising" in str(result)
    assert gaps(local, guide, x, 3, **options).amortized.shape == (3,)


@pytest.mark.slow
def test_any_flow():
    made = []

    def flow(dim):
        made.append(iaf(dim, hidden_dims=(8,)))
        return made[-1]

    result = gaps(model, wrong_guide, X, flow=flow, max_steps=200, **FEW)
    assert len(made) == 1
    # Each datum has its own copy: the flow that was made is as it was.
    assert all(p.grad is None for p in made[0].parameters())
    assert result.flow.mean() > result.gaussian.mean() + 0.5 * FACTORISED_KL


def test_nothing_of_the_models_is_trained():
    decoder = nn.Linear(2, 3).double()

    def vae(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), SD).to_event(1), obs=x)

    before = [p.clone() for p in decoder.parameters()]
    gaps(vae, wrong_guide, X, **FEW, max_steps=20)
    for p, old in zip(decoder.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ais_start": "posterior"}, "ais_start: expected one of prior, gaussian"),
        ({"num_samples": 0}, "num_samples"),
        ({"ais_steps": 0}, "num_steps"),
    ],
    ids=["start", "samples", "steps"],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        gaps(model, wrong_guide, X, **{**FEW, "max_steps": 1, **options})


def test_a_family_has_a_name():
    result = gaps(model, wrong_guide, X, **FEW, max_steps=1)
    with pytest.raises(ValueError, match="gaussian, flow"):
        result.approximation_gap("planar")


def test_one_datum_has_no_standard_error():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    result = gaps(model, guide, X[:1], **FEW, max_steps=1)
    assert math.isnan(result.total_gap().se)
    assert "1 data" in str(result)
