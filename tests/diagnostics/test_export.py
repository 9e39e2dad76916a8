import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from pyro_flows_ext.diagnostics import save_netcdf, to_inference_data
from pyro_flows_ext.programs import draw_particles, vectorization_error

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ 0.23 announces 1.x on import
    import arviz

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def schools(y: Tensor = Y) -> None:
    one = y.new_ones(())
    mu = pyro.sample("mu", dist.Normal(0 * one, 5 * one))
    slope = pyro.sample("slope", dist.Normal(one.new_zeros(3), one).to_event(1))
    with pyro.plate("school", 4):
        eta = pyro.sample("eta", dist.Normal(0 * one, one))
        theta = pyro.deterministic("theta", mu + 2 * eta, event_dim=0)
        pyro.sample("y", dist.Normal(theta + slope.sum(-1), SIGMA.to(y)), obs=y)
    pyro.deterministic("twice", 2 * theta)
    pyro.factor("soft", -(mu**2))


def export(model: Any, *args: Any, **kwargs: Any) -> Any:
    guide = AutoNormal(model)
    guide(*args)
    kwargs.setdefault("num_samples", 30)
    return to_inference_data(model, guide, *args, **kwargs)


def groups(data: Any) -> set[str]:
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names} - {""}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


GROUPS = {"posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_groups_dims_and_values(dtype: torch.dtype) -> None:
    y = Y.to(dtype)
    data = export(schools, y)
    assert groups(data) == GROUPS
    posterior = data["posterior"]
    draw = ("chain", "draw")
    assert posterior["mu"].dims == draw
    assert posterior["slope"].dims == (*draw, "slope_dim_0")
    assert posterior["eta"].dims == (*draw, "school")
    assert posterior["theta"].dims == (*draw, "school")
    assert posterior["twice"].dims == (*draw, "twice_dim_0")
    np.testing.assert_array_equal(posterior["school"].values, np.arange(4))
    assert posterior["eta"].shape == (1, 30, 4)
    assert set(posterior.data_vars) == {"mu", "slope", "eta", "theta", "twice"}
    assert {v.dtype for v in posterior.data_vars.values()} == {np.dtype(str(dtype)[6:])}
    mu, eta = posterior["mu"].values[..., None], posterior["eta"].values
    np.testing.assert_allclose(posterior["theta"].values, mu + 2 * eta, rtol=1e-5)
    np.testing.assert_allclose(posterior["twice"].values, 2 * (mu + 2 * eta), rtol=1e-5)

    mean = posterior["theta"].values + posterior["slope"].values.sum(-1, keepdims=True)
    likelihood = data["log_likelihood"]["y"]
    assert set(data["log_likelihood"].data_vars) == {"y"}
    assert likelihood.dims == (*draw, "school")
    expected = dist.Normal(torch.as_tensor(mean), SIGMA.to(dtype)).log_prob(y)
    np.testing.assert_allclose(likelihood.values, expected, rtol=1e-4)

    assert data["observed_data"]["y"].dims == ("school",)
    np.testing.assert_array_equal(data["observed_data"]["y"].values, y)


def test_log_joint_and_weights() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.25, 0.5**0.5))

    data = to_inference_data(model, guide, num_samples=20)
    z = torch.as_tensor(data["posterior"]["z"].values)
    prior = dist.Normal(0.0, 1.0)
    expected = prior.log_prob(z) + prior.log_prob(z - 0.5)
    np.testing.assert_allclose(data["sample_stats"]["lp"].values, expected, rtol=1e-5)
    # this guide is the posterior: every weight is the evidence
    evidence = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.5))
    np.testing.assert_allclose(data["sample_stats"]["log_weight"].values, evidence, rtol=1e-5)


def sequential_schools(y: Tensor = Y) -> None:
    """Sums over the wrong dimension once particles are added: cannot run in a batch."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("wrong", -(slope.sum() ** 2))
    with pyro.plate("school", 4):
        pyro.sample("y", dist.Normal(mu + slope.sum(), 1e-3), obs=y)


def batched_schools(y: Tensor = Y) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("school", 4):
        pyro.sample("y", dist.Normal(mu + slope.sum(-1), 1e-3), obs=y)


@pytest.mark.parametrize("num_samples", [1, 4, 30], ids=str)
@pytest.mark.parametrize("model", [sequential_schools, batched_schools])
def test_predictions_belong_to_their_draw(model: Any, num_samples: int) -> None:
    """With noise of 1e-3, new data show which draw they came from; 4 draws are as many as schools."""
    guide = AutoNormal(model)
    guide()
    assert (vectorization_error(model, guide) is None) == (model is batched_schools)
    data = to_inference_data(model, guide, num_samples=num_samples)
    mean = data["posterior"]["mu"].values + data["posterior"]["slope"].values.sum(-1)
    predicted = data["posterior_predictive"]["y"]
    assert predicted.dims == ("chain", "draw", "school")
    np.testing.assert_allclose(
        predicted.values, np.broadcast_to(mean[..., None], predicted.shape), atol=0.01
    )
    assert predicted.values.std(-1).min() > 0  # independent in the plate


def test_many_chunks() -> None:
    data = export(batched_schools, num_samples=2005)
    mean = data["posterior"]["mu"].values + data["posterior"]["slope"].values.sum(-1)
    np.testing.assert_allclose(data["posterior_predictive"]["y"].values[..., 0], mean, atol=0.01)


def test_nested_plates_event_dims_and_discrete_data() -> None:
    def model() -> None:
        with pyro.plate("row", 2, dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
            with pyro.plate("column", 3, dim=-1):
                pair = pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = torch.stack([level.expand(pair.shape[:-1]), pair.sum(-1)], -1)
                pyro.sample("kind", dist.Categorical(logits=logits), obs=torch.ones(2, 3).long())
                pyro.sample("where", dist.Normal(pair, 1.0).to_event(1), obs=torch.zeros(2, 3, 2))

    data = export(model)
    draw = ("chain", "draw")
    posterior, new = data["posterior"], data["posterior_predictive"]
    assert posterior["level"].dims == (*draw, "row", "level_dim_1")
    assert posterior["pair"].dims == (*draw, "row", "column", "pair_dim_2")
    assert data["log_likelihood"]["where"].dims == (*draw, "row", "column")
    assert new["where"].dims == (*draw, "row", "column", "where_dim_2")
    assert data["observed_data"]["kind"].dims == ("row", "column")
    assert np.issubdtype(new["kind"].dtype, np.integer)
    assert set(np.unique(new["kind"].values)) == {0, 1}


def test_one_number_observed_by_a_plate() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    data = export(model)
    np.testing.assert_array_equal(data["observed_data"]["x"].values, [2.0, 2.0, 2.0])
    assert data["posterior_predictive"]["x"].shape == (1, 30, 3)


def test_a_model_of_factors_only() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("energy", -(z**2).sum(-1))

    data = export(model)
    assert groups(data) == {"posterior", "sample_stats"}
    z = torch.as_tensor(data["posterior"]["z"].values)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - (z**2).sum(-1)
    np.testing.assert_allclose(data["sample_stats"]["lp"].values, expected, rtol=1e-5)


def test_a_deterministic_that_no_latent_moves() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("design", torch.arange(3.0))

    data = export(model)
    np.testing.assert_array_equal(
        data["posterior"]["design"].values, np.tile(np.arange(3.0), (1, 30, 1))
    )


def test_a_plate_called_like_arviz_own_dimension() -> None:
    def model() -> None:
        with pyro.plate("draw", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert export(model)["posterior"]["z"].dims == ("chain", "draw", "z_dim_0")


def test_without_predictions() -> None:
    data = export(schools, posterior_predictive=False)
    assert groups(data) == GROUPS - {"posterior_predictive"}
    assert data["posterior"]["theta"].shape == (1, 30, 4)


def test_other_guides_and_keywords_of_the_model() -> None:
    guide = AutoNormal(schools)
    guide(y=Y)
    data = to_inference_data(schools, guide, y=Y, num_samples=5)
    assert data["posterior"]["mu"].shape == (1, 5)


def test_points_are_refused() -> None:
    guide = AutoDelta(schools)
    guide(y=Y)
    with pytest.raises(ValueError, match="are points"):
        to_inference_data(schools, guide, y=Y, num_samples=5)


def test_given_draws_keep_their_chains() -> None:
    guide = AutoNormal(schools)
    guide(y=Y)
    draws = {
        name: value.reshape(3, 4, *value.shape[1:]) for name, value in _draws(guide, 12).items()
    }
    data = to_inference_data(schools, guide, y=Y, draws=draws)
    np.testing.assert_array_equal(data["posterior"]["mu"], draws["mu"])
    assert "log_weight" not in data["sample_stats"]
    assert data["log_likelihood"]["y"].shape[:2] == (3, 4)


def _draws(guide: Any, num: int) -> dict[str, Tensor]:
    particles = draw_particles(schools, guide, kwargs={"y": Y}, num_samples=num)
    return particles.samples


class NoSampler(dist.Normal):
    def sample(self, sample_shape: Any = ()) -> Tensor:
        raise NotImplementedError

    rsample = sample


def test_data_that_cannot_be_sampled() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", NoSampler(z, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="posterior_predictive=False"):
        export(model)
    assert "log_likelihood" in groups(export(model, posterior_predictive=False))


def test_labels() -> None:
    data = export(schools, coords={"school": ["A", "B", "C", "D"]})
    assert data["posterior"]["eta"].sel(school="C").shape == (1, 30)
    with pytest.raises(ValueError, match="expected dimensions among"):
        export(schools, coords={"teacher": ["A"]})
    with pytest.raises(ValueError, match="expected 4 labels, got 1"):
        export(schools, coords={"school": ["A"]})


def test_refuses_a_subsampled_plate() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 10, subsample_size=3) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(10)[index])

    with pytest.raises(ValueError, match="subsample"):
        export(model)


def test_leaves_the_models_parameters_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(()))

    def model() -> None:
        pyro.param("weight", weight)
        pyro.sample("z", dist.Normal(weight, 1.0))

    export(model)
    assert weight.grad is None
    assert weight.requires_grad


def test_netcdf_round_trip(tmp_path: Path) -> None:
    data = export(schools)
    save_netcdf(data, tmp_path / "draws.nc")
    again = arviz.from_netcdf(str(tmp_path / "draws.nc"))
    assert groups(again) == GROUPS
    for group in GROUPS:
        for name, value in data[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, value.values)
            assert again[group][name].dims == value.dims
    with pytest.raises(TypeError, match="got dict"):
        save_netcdf({}, tmp_path / "none.nc")  # type: ignore[arg-type]


def test_netcdf_that_does_not_fit_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "draws.nc"
    save_netcdf(export(schools), path)
    before = path.read_bytes()
    data = export(schools, num_samples=2000)
    with file_size_limit(50_000), pytest.raises(OSError, match=r"draws\.nc") as caught:
        save_netcdf(data, path)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["draws.nc"]


@pytest.mark.parametrize(
    ("wanted", "limit", "expected"),
    [(True, 119, True), (False, 120, False), ("auto", 120, True), ("auto", 119, False)],
)
def test_log_likelihood_is_left_out(
    wanted: bool | str, limit: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_flows_ext.diagnostics.export.MAX_LOG_LIKELIHOOD", limit)
    data = export(schools, log_likelihood=wanted)  # 30 draws, 4 rows
    assert ("log_likelihood" in groups(data)) == expected
    with pytest.raises(ValueError, match=r"expected True, False or .auto., got 3"):
        export(schools, log_likelihood=3)


def test_arviz_can_use_it() -> None:
    data = export(schools, num_samples=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a guide that was never trained is no good at prediction
        loo = arviz.loo(data)
    assert np.isfinite(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
    assert set(arviz.extract(data)["eta"].dims) == {"school", "sample"}


def test_a_deterministic_site_that_sums_over_the_batch_is_computed_draw_by_draw():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.deterministic("total", w.sum())

    guide = AutoNormal(model)
    guide()
    posterior = to_inference_data(model, guide, num_samples=5)["posterior"]
    np.testing.assert_allclose(posterior["total"], posterior["w"].sum(axis=-1), rtol=1e-5)


def test_draws_by_chain_with_sites_that_the_model_lacks() -> None:
    draws = {"mu": torch.randn(7, 3), "slope": torch.randn(7, 3, 3), "eta": torch.randn(7, 3, 4)}
    draws["mu_unconstrained"] = draws["mu"]  # as AutoNormal has
    guide = AutoNormal(schools)
    posterior = to_inference_data(schools, guide, Y, draws=draws)["posterior"]
    assert {"mu", "slope", "eta", "theta", "twice"} == set(posterior.data_vars)
    np.testing.assert_array_equal(posterior["mu"].values, draws["mu"].numpy())
