import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_flows_ext.diagnostics import ImportanceResult, importance

X = torch.tensor([0.3, 1.1, -0.4, 0.9, 2.0], dtype=torch.float64)
N = len(X)
# z ~ N(0, 1), x_n ~ N(z, 1): z | x ~ N(Σx / (N + 1), 1 / (N + 1)), x ~ N(0, I + 11ᵀ).
LOC, SCALE = X.sum() / (N + 1), (N + 1) ** -0.5
COVARIANCE = torch.eye(N, dtype=torch.float64) + 1
LOG_EVIDENCE = dist.MultivariateNormal(torch.zeros_like(X), COVARIANCE).log_prob(X).item()


def model(x: Tensor = X) -> None:
    z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_width(factor: float):
    def guide(x: Tensor = X) -> None:
        pyro.sample("z", dist.Normal(LOC.to(x), x.new_tensor(factor * SCALE)))

    return guide


@pytest.fixture(autouse=True)
def _seed() -> None:
    pyro.set_rng_seed(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_posterior_itself(dtype: torch.dtype) -> None:
    result = importance(model, guide_of_width(1.0), X.to(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert result.elbo == pytest.approx(LOG_EVIDENCE, abs=tolerance)
    assert result.log_evidence == pytest.approx(LOG_EVIDENCE, abs=tolerance)
    assert result.elbo_se < tolerance
    assert result.log_evidence_se < tolerance
    assert result.ess == pytest.approx(2000, rel=1e-6)
    assert result.k_hat < 0.5
    assert result.reliable


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_rounding_noise_of_an_exact_guide_has_no_tail(seed: int) -> None:
    """Densities of 20 latents in float32 differ in their last digits, by a few steps: too few values to be a tail."""
    pyro.set_rng_seed(seed)
    zeros, eye = torch.zeros(20), torch.eye(20)
    result = importance(
        lambda: pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1)),
        lambda: pyro.sample("z", dist.MultivariateNormal(zeros, scale_tril=eye)),
    )
    assert result.efficiency == pytest.approx(1.0)
    assert result.k_hat == -math.inf
    assert result.reliable


def test_too_narrow_is_caught() -> None:
    """w ∝ exp(z² (1 / s² - 1) / 2) under z ~ N(0, s²): Pareto of shape 1 - s² (s = 0.4: 0.84)."""
    result = importance(model, guide_of_width(0.4), num_samples=4000)
    assert result.k_hat == pytest.approx(1 - 0.4**2, abs=0.25)
    assert not result.reliable
    assert result.efficiency < 0.3
    assert "Not reliable" in str(result)


def test_too_wide_costs_draws_only() -> None:
    """Weights are bounded by s, and ESS / N = √(2 s² - 1) / s² (s = 3: 0.458)."""
    result = importance(model, guide_of_width(3.0), num_samples=4000)
    assert result.k_hat < 0.3
    assert result.reliable
    assert result.efficiency == pytest.approx(17**0.5 / 9, rel=0.1)
    assert result.log_evidence == pytest.approx(LOG_EVIDENCE, abs=4 * result.log_evidence_se)
    assert result.elbo == pytest.approx(LOG_EVIDENCE + math.log(3) - 4, abs=4 * result.elbo_se)


def test_standard_errors_are_those_of_repeated_runs() -> None:
    runs = [importance(model, guide_of_width(1.5), num_samples=500) for _ in range(100)]
    for name in ("elbo", "log_evidence"):
        spread = torch.tensor([getattr(run, name) for run in runs]).std().item()
        claimed = sum(getattr(run, f"{name}_se") for run in runs) / len(runs)
        assert claimed == pytest.approx(spread, rel=0.3)  # four standard errors of the spread


def test_resampling_moves_draws_to_the_posterior() -> None:
    result = importance(model, guide_of_width(3.0), num_samples=20_000)
    draws = result.resample()["z"]
    assert draws.shape == (20_000,)
    assert result.samples["z"].std().item() == pytest.approx(3 * SCALE, rel=0.05)
    assert draws.std().item() == pytest.approx(SCALE, rel=0.05)
    assert draws.mean().item() == pytest.approx(LOC.item(), abs=0.03)


def test_resampling_without_replacement() -> None:
    result = importance(model, guide_of_width(2.0), num_samples=300)
    assert len(result.resample(50, replace=False)["z"].unique()) == 50
    with pytest.raises(ValueError, match="at most 300"):
        result.resample(301, replace=False)
    with pytest.raises(ValueError, match="positive integer"):
        result.resample(0)


def test_sites_are_resampled_jointly() -> None:
    def pair_model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.stack([a, 2 * a], -1), 1.0).to_event(1))

    def pair_guide() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.5))
        pyro.sample("b", dist.Normal(torch.stack([a, 2 * a], -1), 1e-4).to_event(1))

    draws = importance(pair_model, pair_guide, num_samples=100).resample(40)
    assert draws["b"].shape == (40, 2)
    expected = torch.stack([draws["a"], 2 * draws["a"]], -1)
    torch.testing.assert_close(draws["b"], expected, rtol=0, atol=1e-3)


def test_autoguide_and_model_kwargs() -> None:
    guide = AutoNormal(model)
    guide(x=X.float())
    result = importance(model, guide, x=X.float(), num_samples=100)
    assert isinstance(result, ImportanceResult)
    assert result.samples["z"].shape == (100,)
    assert result.elbo < LOG_EVIDENCE


def test_a_guide_beyond_the_support() -> None:
    def positive_model() -> None:
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def hopeless() -> None:
        pyro.sample("z", dist.Normal(-100.0, 1.0))

    with pyro.validation_enabled(False):
        # Outside of the support the model has no density: these draws have weight zero.
        result = importance(positive_model, guide, num_samples=2000)
        assert result.elbo == -math.inf
        assert (result.resample()["z"] > 0).all()
        hopeless_result = importance(positive_model, hopeless, num_samples=200)
        assert not hopeless_result.reliable
        assert "misses the support" in hopeless_result.verdict
        with pytest.raises(ValueError, match="finite"):
            hopeless_result.resample()


@pytest.mark.parametrize("num_samples", [1, 0, 2.5], ids=str)
def test_refuses_too_few_draws(num_samples: float) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        importance(model, guide_of_width(1.0), num_samples=num_samples)  # type: ignore[arg-type]


def test_too_few_to_tell() -> None:
    result = importance(model, guide_of_width(1.5), num_samples=20)
    assert result.k_hat == math.inf
    assert not result.reliable
    assert "more draws" in str(result)


def result_with(**changes: float) -> ImportanceResult:
    zeros = torch.zeros(1000, dtype=torch.float64)
    numbers = {
        "k_hat": 0.123, "ess": 940.0, "elbo": -12.3456, "elbo_se": 0.0123,
        "log_evidence": -12.3, "log_evidence_se": 0.2,
    }  # fmt: skip
    return ImportanceResult(
        samples={}, log_weights=zeros, smoothed_log_weights=zeros, **{**numbers, **changes}
    )


def test_reads_well() -> None:
    first, second = str(result_with()).split("\n")
    assert first == (
        "k-hat 0.12   ESS 940 of 1000 (94.0%)   ELBO -12.346 ± 0.012   log evidence -12.30 ± 0.20"
    )
    assert second.startswith("Reliable weights: k-hat is below 0.67.")
    assert "By itself it can mislead" in second
    assert "samples" not in repr(result_with())


@pytest.mark.parametrize(
    ("k_hat", "reliable"),
    [(0.66, True), (0.67, False), (math.nan, False), (math.inf, False), (-math.inf, True)],
    ids=str,
)
def test_threshold_depends_on_the_number_of_draws(k_hat: float, reliable: bool) -> None:
    assert result_with(k_hat=k_hat).reliable is reliable  # 1 - 1 / log10(1000) = 2/3


@pytest.mark.parametrize(
    ("se", "text"),
    [
        (0.0, "-12.3456 ± 0.0000"),
        (3.4, "-12.3 ± 3.4"),
        (150.0, "-12 ± 150"),
        (math.inf, "-12.3 ± inf"),
    ],
    ids=str,
)
def test_digits_follow_the_error(se: float, text: str) -> None:
    assert f"ELBO {text} " in str(result_with(elbo_se=se))
