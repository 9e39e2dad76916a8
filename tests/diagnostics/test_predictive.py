"""PIT, CRPS and quantiles against closed forms."""

import math

import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext as pf
from pyro_flows_ext.diagnostics import crps, pit, rank_histogram
from pyro_flows_ext.distributions import FlowDistribution
from pyro_flows_ext.transforms import ElementwiseAffine, Whitening

LOC, SCALE = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])


def normal(loc=LOC, scale=SCALE):
    """N(loc, scale²) as a density."""
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return FlowDistribution(base, Whitening(loc, scale.diag()))


def linear():
    """y | x ~ N(2 x, 0.5²)."""
    density = FlowDistribution(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        ElementwiseAffine(1, context_dim=1, hidden_dims=()),
    )
    with torch.no_grad():
        for name, p in density.named_parameters():
            p.zero_()
            if "hyper" in name and p.dim() == 2:  # rows: of the parameters in their order
                p[list(dict(density.transform.named_parameters(recurse=False))).index("loc")] = 2.0
        density.transform.log_scale.fill_(math.log(0.5))
    return density


def crps_of_normal(y, loc, scale):
    """Gneiting & Raftery 2007, eq. 21."""
    z = (y - loc) / scale
    standard = dist.Normal(0.0, 1.0)
    density = standard.log_prob(z).exp()
    return scale * (z * (2 * standard.cdf(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))


def test_crps_of_a_normal():
    y = torch.tensor([[2.0, -1.0], [3.5, 4.0], [1.0, -8.0]])
    found = crps(normal(), y, num_draws=40_000)
    torch.testing.assert_close(found, crps_of_normal(y, LOC, SCALE), rtol=0.02, atol=0.01)


def test_crps_is_unbiased_with_two_draws():
    y = torch.zeros(40_000, 2)
    found = crps(normal(), y, num_draws=2).mean(0)
    expected = crps_of_normal(y[0], LOC, SCALE)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_crps_at_a_context():
    density = linear()
    x = torch.tensor([[0.0], [1.0], [-3.0]])
    y = torch.tensor([[0.0], [0.0], [-6.5]])
    found = crps(density, y, x, num_draws=40_000)
    torch.testing.assert_close(found, crps_of_normal(y, 2 * x, 0.5), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("scale", "how"),
    [(1.0, "No sign of miscalibration"), (0.5, "too close together"), (2.0, "too far apart")],
)
def test_pit_of_a_normal(scale, how):
    y = LOC + SCALE * torch.randn(1000, 2)
    result = pit(normal(scale=scale * SCALE), y)
    assert how in result.verdict
    assert result.num_draws == 99
    assert all(ranks.shape == (1000,) for ranks in result.ranks.values())


def test_pit_at_contexts():
    x = torch.randn(1000, 1)
    y = 2 * x + 0.5 * torch.randn(1000, 1)
    assert "No sign" in pit(linear(), y, x).verdict
    # Marginally right, and conditionally independent of the context: not calibrated at a context.
    assert "Miscalibrated" in pit(linear(), y, torch.zeros(1000, 1)).verdict


def test_columns_have_their_names_in_the_picture():
    frame = pd.DataFrame((LOC + SCALE * torch.randn(300, 2)).numpy(), columns=["dose", "time"])
    result = pit(normal(), frame)
    axes = rank_histogram(result)
    assert [ax.get_title().split()[0] for ax in axes.flat] == ["dose", "time"]
    assert list(pit(normal(), frame.to_numpy(), columns=["a", "b"]).ranks) == ["a", "b"]


def test_quantiles():
    found = normal().quantiles([0.05, 0.5, 0.95], num_samples=100_000)
    expected = dist.Normal(LOC, SCALE).icdf(torch.tensor([[0.05], [0.5], [0.95]]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    at = linear().condition(torch.tensor([[0.0], [1.0], [2.0]]))
    assert at.quantiles([0.1, 0.9]).shape == (2, 3, 1)
    torch.testing.assert_close(at.quantiles([0.5])[0], 2 * at.context, rtol=0, atol=0.03)
    with pytest.raises(ValueError, match="probs: expected a list of numbers from 0 to 1"):
        normal().quantiles([5, 95])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crps(normal(), torch.zeros(5, 3)), r"data: expected rows \(N, 2\), got \(5, 3\)"),
        (lambda: crps(normal(), torch.zeros(5, 2), num_draws=1), "num_draws: expected at least 2"),
        (lambda: pit(normal(), torch.zeros(5, 2), torch.zeros(5, 1)), "context: expected none"),
        (lambda: pit(linear(), torch.zeros(5, 1)), r"context: expected one of shape \(5, 1\)"),
        (lambda: pit(linear(), torch.zeros(5, 1), torch.zeros(4, 1)), r"context: expected shape"),
        (lambda: pit(normal(), torch.zeros(5, 2), columns=["a"]), "columns: expected 2 names"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_a_conditional_density_end_to_end():
    """y | x ~ N(sin x, (0.1 + 0.2 |x|)²): fit, score, draw, quantiles, calibration."""
    x = 4 * torch.rand(3000, 1) - 2
    sd = 0.1 + 0.2 * x.abs()
    y = x.sin() + sd * torch.randn(3000, 1)
    density = pf.flows.NSF(1, context_dim=1, num_layers=1, hidden_dims=(32, 32))
    pf.fit_density(density, y[:2500], x[:2500], num_steps=600, lr=0.01, seed=0, progress=False)
    at = density.condition(x[2500:])
    expected = dist.Normal(x[2500:].sin(), sd[2500:]).to_event(1).log_prob(y[2500:]).mean()
    assert at.log_prob(y[2500:]).mean() > expected - 0.08
    low, high = at.quantiles([0.1, 0.9], num_samples=2000)
    inside = ((y[2500:] > low) & (y[2500:] < high)).float().mean()
    assert inside.item() == pytest.approx(0.8, abs=0.05)
    best = crps_of_normal(y[2500:], x[2500:].sin(), sd[2500:]).mean()
    assert crps(density, y[2500:], x[2500:]).mean() < 1.1 * best
    assert pit(density, y[2500:], x[2500:]).p_value > 1e-3
