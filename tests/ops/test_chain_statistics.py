"""R-hat, bulk ESS and normal scores, against ArviZ and closed forms."""

import warnings

import numpy as np
import pytest
import torch

from pyro_flows_ext.ops import bulk_ess, normal_scores, r_hat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


def autoregressive(num_chains, num_draws, a, size=1):
    """Stationary chains with autocorrelation a and standard normal margins, `(C, S, size)`."""
    x = [torch.randn(num_chains, size, dtype=torch.float64)]
    for _ in range(num_draws - 1):
        x.append(a * x[-1] + (1 - a * a) ** 0.5 * torch.randn(num_chains, size).double())
    return torch.stack(x, 1)


@pytest.mark.parametrize(("chains", "draws"), [(4, 100), (64, 16), (128, 31)])
@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, -0.5])
def test_r_hat_is_that_of_arviz(chains, draws, a):
    x = autoregressive(chains, draws, a)[..., 0]
    x[: chains // 2] *= 1.5
    torch.testing.assert_close(r_hat(x).item(), float(arviz.rhat(x.numpy())), atol=5e-3, rtol=0)


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9])
def test_bulk_ess_is_that_of_arviz_for_long_chains(a):
    x = autoregressive(4, 1000, a)[..., 0].exp()
    assert bulk_ess(x).item() == pytest.approx(float(arviz.ess(x.numpy())), rel=0.1)


def test_bulk_ess_of_many_short_chains_is_about_that_of_theory():
    x = autoregressive(256, 32, 0.5, size=20)
    assert bulk_ess(x).mean().item() == pytest.approx(256 * 32 / 3, rel=0.15)


def test_bulk_ess_of_antithetic_draws_is_limited():
    x = torch.randn(8, 100, dtype=torch.float64)
    x[:, 1::2] = -x[:, ::2]
    assert 1600 < bulk_ess(x).item() <= 800 * np.log10(800)


def test_elementwise_over_any_shape():
    x = autoregressive(8, 20, 0.3, size=6).reshape(8, 20, 2, 3)
    for statistic in (r_hat, bulk_ess):
        alone = torch.stack([statistic(x[..., i, j]) for i in range(2) for j in range(3)])
        torch.testing.assert_close(statistic(x), alone.reshape(2, 3))


def test_constants_and_values_that_are_not_finite():
    x = torch.randn(4, 10, 3)
    x[..., 0] = 2.0
    x[1, 3, 1] = torch.nan
    assert r_hat(x)[0] == 1.0
    assert bulk_ess(x)[0] == 40.0
    assert r_hat(x).isnan().tolist() == [False, True, False]
    assert bulk_ess(x).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(1, 10), (4, 3), (10,)])
def test_too_few_draws_are_refused(shape):
    for statistic in (r_hat, bulk_ess):
        with pytest.raises(ValueError, match="at least 2 chains of 4 draws"):
            statistic(torch.zeros(shape))


def test_normal_scores_undo_a_monotone_map():
    reference = torch.randn(20_000, 1, dtype=torch.float64)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(3, 3, 1)
    torch.testing.assert_close(normal_scores(x.exp(), reference.exp()), x, atol=0.06, rtol=0)


def test_normal_scores_of_ties_are_equal_and_those_outside_are_finite():
    reference = torch.tensor([0.0, 1.0, 1.0, 2.0]).unsqueeze(-1)
    scores = normal_scores(torch.tensor([[-9.0], [1.0], [9.0]]), reference)
    assert scores.isfinite().all()
    assert scores[1] == 0.0
    torch.testing.assert_close(scores[0], -scores[2])
