import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_flows_ext.ops import effective_sample_size, pareto_smooth, quantiles


def pareto_log_weights(k: float, size: int, seed: int) -> Tensor:
    """Logarithms of draws whose tail is exactly generalised Pareto of shape k: u⁻ᵏ for k > 0, 1 - u⁻ᵏ for k < 0."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(size, dtype=torch.float64, generator=generator).clamp(min=1e-12)
    if k == 0:
        return (-u.log()).log()
    return -k * u.log() if k > 0 else torch.log1p(-(u ** (-k)))


@pytest.mark.parametrize("k", [-0.5, 0.0, 0.3, 0.7, 1.0, 1.5])
def test_k_hat_of_a_known_tail(k: float) -> None:
    size = 10_000
    tail = 3 * size**0.5
    estimates = [pareto_smooth(pareto_log_weights(k, size, seed))[1].item() for seed in range(20)]
    # The asymptotic sd of the maximum-likelihood k is (1 + k) / √tail (Smith 1987) for k > -1/2.
    expected = (tail * k + 10 * 0.5) / (tail + 10)
    tolerance = 3 * max(1 + k, 1.0) / (20 * tail) ** 0.5 + 0.03
    assert np.mean(estimates) == pytest.approx(expected, abs=tolerance)
    assert np.std(estimates) < 2 * max(1 + k, 1.0) / tail**0.5


def arviz_psislw(log_weights: Tensor) -> tuple[np.ndarray, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces 1.x on import
        import arviz
    if not hasattr(arviz, "psislw"):
        pytest.skip("ArviZ 1.x has no psislw for plain arrays")
    smoothed, k_hat = arviz.psislw(log_weights.numpy().copy())
    return np.asarray(smoothed), float(k_hat)


WEIGHTS = {
    "normal": lambda g: torch.randn(2000, dtype=torch.float64, generator=g),
    "wide": lambda g: 5 * torch.randn(1000, dtype=torch.float64, generator=g) - 1e4,
    "bounded": lambda g: -(torch.randn(500, dtype=torch.float64, generator=g) ** 2),
    "cauchy": lambda g: torch.randn(3001, dtype=torch.float64, generator=g).tan().abs().log(),
    "small": lambda g: torch.randn(21, dtype=torch.float64, generator=g),
    "holes": lambda g: torch.where(
        torch.rand(400, dtype=torch.float64, generator=g) < 0.5,
        -torch.inf,
        torch.randn(400, dtype=torch.float64, generator=g),
    ),
    "mostly_zero": lambda g: torch.where(
        torch.rand(400, dtype=torch.float64, generator=g) < 0.9,
        -torch.inf,
        torch.randn(400, dtype=torch.float64, generator=g),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_agrees_with_arviz(name: str) -> None:
    log_weights = WEIGHTS[name](torch.Generator().manual_seed(1))
    expected, expected_k = arviz_psislw(log_weights)
    smoothed, k_hat = pareto_smooth(log_weights)
    assert k_hat.item() == pytest.approx(expected_k, abs=1e-9)
    np.testing.assert_allclose(smoothed.log_softmax(0).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_smoothing_touches_the_tail_only() -> None:
    log_weights = pareto_log_weights(0.9, 1000, 0)
    smoothed, _ = pareto_smooth(log_weights)
    size = math.ceil(3 * 1000**0.5)
    changed = smoothed != log_weights
    assert changed.sum() >= size - 1
    assert not changed[log_weights.argsort()[:-size]].any()
    assert smoothed.max() <= log_weights.max()
    assert torch.equal(smoothed.argsort(), log_weights.argsort())


def test_smoothing_brings_the_mean_closer() -> None:
    """E u^(-0.8) = 5; the raw mean has infinite variance there."""
    raw, smooth = [], []
    for seed in range(50):
        log_weights = pareto_log_weights(0.8, 1000, seed)
        raw.append(log_weights.logsumexp(0).item() - math.log(1000) - math.log(5))
        smoothed = pareto_smooth(log_weights)[0]
        smooth.append(smoothed.logsumexp(0).item() - math.log(1000) - math.log(5))
    assert np.square(smooth).mean() < np.square(raw).mean()


@pytest.mark.parametrize("shift", [-1e5, 0.0, 1e5], ids=str)
def test_k_hat_knows_no_normalisation(shift: float) -> None:
    log_weights = WEIGHTS["normal"](torch.Generator().manual_seed(2))
    smoothed, k_hat = pareto_smooth(log_weights)
    moved, moved_k = pareto_smooth(log_weights + shift)
    assert moved_k.item() == pytest.approx(k_hat.item(), abs=1e-6)
    torch.testing.assert_close(moved - shift, smoothed, rtol=0, atol=1e-9)


def test_narrow_tails_are_resolved() -> None:
    """Weights within 1e-12 of one another still have the shape of their excesses."""
    log_weights = pareto_log_weights(0.5, 1000, 0)
    narrow = torch.log1p(1e-10 * log_weights.exp())
    assert pareto_smooth(narrow)[1].item() == pytest.approx(
        pareto_smooth(log_weights)[1].item(), abs=1e-3
    )


nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("log_weights", "expected"),
    [
        pytest.param(torch.full((100,), -3.0), -inf, id="constant"),
        pytest.param(torch.zeros(1), inf, id="one"),
        pytest.param(torch.linspace(-1, 1, 20), inf, id="twenty"),
        pytest.param(
            torch.cat([torch.zeros(50), -torch.rand(50)]), -inf, id="half_tied_at_the_top"
        ),
        pytest.param(
            torch.cat([torch.zeros(97), torch.arange(1.0, 4.0)]), inf, id="three_stand_out"
        ),
        pytest.param(torch.cat([torch.full((99,), -inf), torch.zeros(1)]), inf, id="one_weight"),
        pytest.param(torch.full((100,), -inf), nan, id="all_zero"),
        pytest.param(torch.cat([torch.rand(99), torch.tensor([nan])]), nan, id="a_nan"),
        pytest.param(torch.cat([torch.rand(99), torch.tensor([inf])]), nan, id="an_infinity"),
    ],
)
def test_where_no_tail_can_be_fitted(log_weights: Tensor, expected: float) -> None:
    smoothed, k_hat = pareto_smooth(log_weights)
    assert k_hat.item() == pytest.approx(expected, nan_ok=True)
    torch.testing.assert_close(smoothed, log_weights, rtol=0, atol=0, equal_nan=True)


def test_rounding_noise_is_constant() -> None:
    noisy = torch.full((1000,), -1234.5) + 1e-4 * torch.randn(
        1000, generator=torch.Generator().manual_seed(0)
    )
    assert pareto_smooth(noisy)[1] == -inf


def test_dtype_and_input_are_kept() -> None:
    log_weights = WEIGHTS["normal"](torch.Generator().manual_seed(3))
    single = log_weights.float()
    before = single.clone()
    smoothed, k_hat = pareto_smooth(single)
    assert smoothed.dtype == torch.float32
    assert torch.equal(single, before)
    assert k_hat.item() == pytest.approx(pareto_smooth(log_weights)[1].item(), abs=1e-4)


@pytest.mark.parametrize("shape", [(), (0,), (3, 4)], ids=str)
def test_refuses_what_is_no_vector(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="non-empty vector"):
        pareto_smooth(torch.zeros(shape))


def test_effective_sample_size() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    ess = effective_sample_size(weights.double().log() + 1e4)
    torch.testing.assert_close(
        ess, torch.tensor([8 / 3, 3.0, 1.0], dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert effective_sample_size(torch.full((3,), -inf)).isnan()
    assert effective_sample_size(torch.tensor([0.0, nan])).isnan()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_quantiles_are_by_element(shape) -> None:
    draws = torch.randn(50, *shape)
    result = quantiles(draws, [0.25, 0.5])
    assert result.shape == (2, *shape)
    torch.testing.assert_close(result[1], draws.quantile(0.5, dim=0))


def test_quantiles_of_more_numbers_than_older_torch_takes_at_once(monkeypatch) -> None:
    sizes, quantile = [], Tensor.quantile
    monkeypatch.setattr(
        Tensor, "quantile", lambda x, q, dim: (sizes.append(x.numel()), quantile(x, q, dim))[1]
    )
    draws = torch.arange(5.0)[:, None] + torch.arange(4_000_000.0)
    torch.testing.assert_close(quantiles(draws, torch.tensor([0.25])), draws[1][None])
    assert sum(sizes) == draws.numel()
    assert max(sizes) <= 10_000_000
