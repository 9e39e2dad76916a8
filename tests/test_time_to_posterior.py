"""The helpers of the benchmark of times to a posterior: moments, errors, verdicts, and the plain models' sizes."""

import json
import math
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from plain_models import PLAIN_MODELS, arguments
from time_to_posterior_problems import errors, is_right, moments, problem, unsettled_sds
from time_to_posterior_report import median, ratio, read, seconds_per_400, verdict_words, verdicts


def test_moments_are_those_of_the_draws():
    found = moments({"a": torch.tensor([1.0, 2.0, 3.0])})
    assert found == {"a": (2.0, 1.0)}


def test_errors_are_the_largest_in_reference_sds():
    reference = {"a": (0.0, 2.0), "b": (1.0, 0.5)}
    found = {"a": (0.2, 1.8), "b": (0.9, 0.6)}
    expected = {"mean_error": 0.2, "sd_low": 0.9, "sd_high": 1.2}
    assert errors(found, reference) == pytest.approx(expected)


def test_sds_of_long_tails_are_not_compared():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2000, generator=generator, dtype=torch.float64)
    tail = torch.rand(2000, generator=generator, dtype=torch.float64).pow(-0.8)  # no variance
    unsettled = unsettled_sds({"normal": normal, "tail": tail})
    assert unsettled == {"tail"}
    reference = {"normal": (0.0, 1.0), "tail": (1.0, 9.0)}
    found = errors({"normal": (0.0, 1.1), "tail": (1.0, 2.0)}, reference, unsettled)
    assert found["sd_low"] == pytest.approx(1.1)


def test_errors_are_infinite_where_a_moment_is_not_finite():
    found = errors({"a": (math.nan, 1.0)}, {"a": (0.0, 1.0)})
    assert found["mean_error"] == math.inf
    assert not is_right(found)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ({"mean_error": 0.15, "sd_low": 0.85, "sd_high": 1.15}, True),
        ({"mean_error": 0.16, "sd_low": 1.0, "sd_high": 1.0}, False),
        ({"mean_error": 0.0, "sd_low": 0.84, "sd_high": 1.0}, False),
        ({"mean_error": 0.0, "sd_low": 1.0, "sd_high": 1.16}, False),
    ],
    ids=["at the bounds", "mean", "narrow", "wide"],
)
def test_right_means_all_three_bounds(error, expected):
    assert is_right(error) is expected


def test_verdicts_count_trusted_against_right():
    rows = [
        {"trusted": True, "right": True},
        {"trusted": True, "right": False},
        {"trusted": True, "right": True},
        {"failed": "no answer in 900 s"},
    ]
    assert dict(verdicts(rows)) == {(True, True): 2, (True, False): 1}
    assert verdict_words([rows[0], rows[3]]) == "trusted, failed"
    assert verdict_words([{"trusted": False, "reason": "level"}] * 2) == "no: level"


def test_seconds_are_medians_over_seeds():
    nuts = [{"cpu": 8.0, "ess": 200.0}, {"cpu": 8.0, "ess": 800.0}, {"cpu": 8.0, "ess": 400.0}]
    assert seconds_per_400(nuts) == 8.0
    assert ratio([{"cpu": 2.0}, {"failed": "..."}], nuts) == 0.25
    assert math.isnan(median([{"failed": "..."}], "cpu"))


def test_the_last_of_a_repeated_run_counts_and_late_references_are_applied(tmp_path):
    row = {"model": "mixture", "method": "fit", "seed": 0, "moments": {"w": [0.5, 0.1]}}
    results, references = tmp_path / "rows.json", tmp_path / "references.json"
    results.write_text(json.dumps([row | {"cpu": 9.0}, row | {"cpu": 3.0}]))
    references.write_text(json.dumps({"mixture": {"moments": {"w": [0.4, 0.1]}}}))
    (found,) = read([results], references)["mixture", "fit"]
    assert found["cpu"] == 3.0
    assert found["mean_error"] == pytest.approx(1.0)
    assert not found["right"]


@pytest.mark.parametrize("name", PLAIN_MODELS)
def test_plain_model_has_the_latents_that_it_states(name):
    pyro.set_rng_seed(0)
    task = problem(name)
    trace = poutine.trace(task.model).get_trace(*task.args)
    latents = {
        name: site["value"]
        for name, site in trace.iter_stochastic_nodes()
        if not site_is_subsample(site)
    }
    assert sum(value.numel() for value in latents.values()) == task.dim
    assert math.isfinite(trace.log_prob_sum())
    scalars = task.quantities({k: v.expand(3, *v.shape) for k, v in latents.items()})
    assert all(value.shape == (3,) for value in scalars.values())


def test_data_are_the_same_on_every_call():
    for first, second in zip(arguments("missing"), arguments("missing"), strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num())
