import math
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_flows_ext.distributions.energies import u1
from pyro_flows_ext.programs import vectorization_error
from pyro_flows_ext.testing.targets import TARGETS, Target, load_target


@pytest.fixture(autouse=True)
def clean_param_store():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def built_in(name: str) -> tuple[Target, dict[str, torch.Tensor]]:
    if name.endswith("-regression"):
        pytest.importorskip("sklearn")
    return load_target(name)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- the built-in models ---


@pytest.mark.parametrize("name", list(TARGETS))
def test_vectorises_over_particles(name: str) -> None:
    target, data = built_in(name)
    guide = AutoNormal(target.model)
    guide(**data)
    assert vectorization_error(target.model, guide, (), data) is None


@pytest.mark.parametrize("name", list(TARGETS))
def test_reference_names_scalars_of_the_model(name: str) -> None:
    target, data = built_in(name)
    trace = poutine.trace(target.model).get_trace(**data)
    scalars = set()
    for site, node in trace.nodes.items():
        if node["type"] == "sample" and torch.is_tensor(node["value"]):
            value = node["value"]
            scalars |= {f"{site}[{i}]" for i in range(len(value))} if value.dim() else {site}
    assert set(target.reference or {}) <= scalars
    assert all(sd > 0 for _, sd in (target.reference or {}).values())


def test_eight_schools_density() -> None:
    """Term by term, as Stan's program has it, constants included."""
    target, data = load_target("eight-schools")
    mu, tau, trans = 3.0, 2.0, np.linspace(-1, 1, 8)

    def normal(x, loc, scale):
        return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * math.log(2 * math.pi)

    expected = normal(mu, 0, 5) + math.log(2 / (math.pi * 5 * (1 + (tau / 5) ** 2)))
    expected += normal(trans, 0, 1).sum()
    y, sigma = (data[key].double().numpy() for key in ("y", "sigma"))
    expected += normal(y, mu + tau * trans, sigma).sum()
    values = {
        "mu": torch.tensor(mu),
        "tau": torch.tensor(tau),
        "theta_trans": torch.as_tensor(trans, dtype=torch.float32),
    }
    trace = poutine.trace(poutine.condition(target.model, values)).get_trace(**data)
    assert trace.log_prob_sum().item() == pytest.approx(expected, rel=1e-5)

    centered, _ = load_target("eight-schools-centered")
    values["theta"] = mu + tau * values.pop("theta_trans")
    trace = poutine.trace(poutine.condition(centered.model, values)).get_trace(**data)
    # The change of variables from theta to theta_trans: dtheta = tau dtheta_trans, eight times.
    assert trace.log_prob_sum().item() == pytest.approx(expected - 8 * math.log(tau), rel=1e-5)


def test_eight_schools_reference_is_the_posterior() -> None:
    """On a grid of (mu, tau), theta integrated out in closed form."""
    target, data = load_target("eight-schools")
    y, sigma = data["y"].double(), data["sigma"].double()
    mu = torch.linspace(-15, 25, 401, dtype=torch.float64).unsqueeze(-1)
    tau = torch.linspace(0.005, 60, 6001, dtype=torch.float64)
    log_p = -0.5 * (mu / 5) ** 2 - torch.log1p((tau / 5) ** 2)
    for y_j, sigma_j in zip(y, sigma, strict=True):
        variance = sigma_j**2 + tau**2
        log_p = log_p - 0.5 * ((y_j - mu) ** 2 / variance + variance.log())
    p = (log_p - log_p.logsumexp((0, 1))).exp()
    assert target.reference is not None
    for name, value in (("mu", mu), ("tau", tau)):
        mean = (p * value).sum().item()
        sd = (p * (value - mean) ** 2).sum().sqrt().item()
        # The reference is from 10,000 draws: standard errors of .01 sd for the mean and about .02 for the sd.
        assert target.reference[name] == pytest.approx((mean, sd), abs=0.04 * sd), name


def test_u1_log_joint_is_minus_the_energy() -> None:
    target, _ = load_target("u1")
    z = torch.tensor([1.7, -0.4])
    trace = poutine.trace(poutine.condition(target.model, {"z": z})).get_trace()
    assert trace.log_prob_sum().item() == -u1(z).item()


def test_standardised_columns() -> None:
    pytest.importorskip("sklearn")
    _, data = load_target("linear-regression")
    for value in data.values():
        torch.testing.assert_close(value.mean(0), torch.zeros(value.shape[1:]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            value.std(0, correction=0), torch.ones(value.shape[1:]), atol=1e-4, rtol=0
        )
    _, data = load_target("logistic-regression")
    assert set(data["y"].unique().tolist()) == {0.0, 1.0}


def test_without_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        load_target("linear-regression")


# --- somebody's own model ---

MODEL = """
import pyro, pyro.distributions as dist
from neighbour import SCALE

def model(x, y, prior_scale=10.0):
    '''A slope.'''
    slope = pyro.sample("slope", dist.Normal(0.0, prior_scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, SCALE), obs=y)

def anything(**data):
    pass

number = 3
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    write(tmp_path / "neighbour.py", "SCALE = 1.0")
    return write(tmp_path / "slope.py", MODEL)


def test_model_from_a_file(model_file: Path) -> None:
    path = list(sys.path)
    data_path = write(model_file.parent / "data.json", '{"x": [1, 2], "y": [0.5, 1.5]}')
    target, data = load_target(f"{model_file}:model", data_path)
    assert target.description == "A slope."
    assert set(data) == {"x", "y"}
    assert poutine.trace(target.model).get_trace(**data).log_prob_sum().isfinite()
    assert sys.path == path
    load_target(f"{model_file}:anything", data_path)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("model", "no data given: missing x, y; expected x, y, prior_scale \\(optional\\)"),
        ("other", "expected a model named 'other', a function, found nothing"),
        ("number", "expected a model named 'number', a function, found int"),
    ],
)
def test_model_from_a_file_refused(model_file: Path, attribute: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_target(f"{model_file}:{attribute}")


def test_file_that_raises(tmp_path: Path) -> None:
    write(tmp_path / "broken.py", "1 / 0")
    with pytest.raises(
        ValueError, match=r"broken\.py' raised .*broken\.py:1: ZeroDivisionError: division by zero"
    ):
        load_target(f"{tmp_path / 'broken.py'}:model")
    with pytest.raises(ValueError, match=r"no file '.*gone\.py'"):
        load_target(f"{tmp_path / 'gone.py'}:model")


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no target 'nine-schools': expected one of eight-schools"):
        load_target("nine-schools")


def test_wrong_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", '{"y": [1, 2], "scale": [1, 2]}')
    with pytest.raises(ValueError, match="missing sigma; unexpected scale; expected y, sigma"):
        load_target("eight-schools", path)
    with pytest.raises(ValueError, match="unexpected y, scale; expected no data"):
        load_target("u1", path)


def test_whole_numbers_fit_the_built_in_models(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", '{"y": [28, 8], "sigma": [15, 10]}')
    target, data = load_target("eight-schools", path)
    assert poutine.trace(target.model).get_trace(**data).log_prob_sum().isfinite()


FLOATS = """
import torch, pyro, pyro.distributions as dist

def model(X, group, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    alpha = pyro.sample("alpha", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(alpha[group] + X @ w, 1.0), obs=y)

def broken(X, group, y):
    calls.append(1)
    {}["gone"]

calls = []
"""


def test_integers_become_floats_where_the_model_needs_floats(tmp_path: Path) -> None:
    write(tmp_path / "floats.py", FLOATS)
    text = '{"X": [[1, 2], [3, 4], [5, 6]], "group": [0, 2, 1], "y": [1, 2, 3]}'
    target, data = load_target(f"{tmp_path / 'floats.py'}:model", write(tmp_path / "d.json", text))
    types = {name: value.dtype for name, value in data.items()}
    assert types == {"X": torch.float32, "group": torch.int64, "y": torch.int64}
    assert poutine.trace(target.model).get_trace(**data).log_prob_sum().isfinite()


def test_an_error_that_types_do_not_explain_is_left_to_the_fit(tmp_path: Path) -> None:
    write(tmp_path / "broken.py", FLOATS)
    text = '{"X": [[1, 2]], "group": [0], "y": [1]}'
    target, data = load_target(f"{tmp_path / 'broken.py'}:broken", write(tmp_path / "d.json", text))
    assert all(value.dtype == torch.int64 for value in data.values())
    assert len(target.model.__globals__["calls"]) == 1
