"""The targets of the posterior benchmark: their machinery on a model of our own, and Stein's identities at reference draws."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from targets import TARGETS, Reference, Target, data_root, load
from targets.by_hand import BY_HAND, largest_difference
from targets.check import points, stein, why_not
from targets.ode import Problem, lotka_volterra, michaelis_menten, solve
from targets.target import flatten

needs_data = pytest.mark.skipif(
    "PYRO_FLOWS_DATA" not in os.environ,
    reason="PYRO_FLOWS_DATA does not name the folder of reference posteriors",
)

CHEAPEST = (
    "eight_schools-eight_schools_centered",
    "eight_schools-eight_schools_noncentered",
    "kidiq-kidscore_momiq",
    "mesquite-mesquite",
    "gp_pois_regr-gp_regr",
)


# --- with the data ---


@needs_data
@pytest.mark.parametrize("name", CHEAPEST)
def test_stein_identities(name: str) -> None:
    target = load(name)
    z = stein(target)
    assert z is not None
    assert all(len(values) == target.dim for values in z)
    assert max(values.abs().max().item() for values in z) < 4


@needs_data
@pytest.mark.parametrize("name", list(TARGETS))
def test_shapes_and_names(name: str) -> None:
    target = load(name)
    assert target.log_density.dim == target.dim
    assert why_not(target) is None
    reference = target.reference
    assert reference.mean.keys() == reference.sd.keys()
    samples = points(target, 3)
    quantities = target.quantities(samples)
    assert list(quantities) == list(reference.mean)
    for key, value in (reference.draws or {}).items():
        torch.testing.assert_close(quantities[key], value[:3])
    back = target.constrain(target.unconstrain(samples))
    for site in target.sites:
        torch.testing.assert_close(back[site], samples[site])


@needs_data
@pytest.mark.parametrize("name", list(BY_HAND))
def test_density_by_hand(name: str) -> None:
    target = load(name)
    difference = largest_difference(target, points(target, 20))
    assert difference is not None
    assert difference < 1e-9


@needs_data
@pytest.mark.parametrize("name", list(TARGETS))
def test_far_out(name: str) -> None:
    """No error and no NaN up to where numbers overflow, and a score wherever the density is at all moderate."""
    target = load(name)
    u = target.unconstrain(points(target, 1)).expand(40, -1)
    distances = torch.logspace(0, 3, 40, dtype=u.dtype).unsqueeze(-1)
    value, score = target.score(u + distances * torch.randn_like(u))
    assert not value.isnan().any()
    assert (value < math.inf).all()
    moderate = (distances.squeeze(-1) < 20) & (value > -1e50)
    assert moderate.any()
    assert score[moderate].isfinite().all()


@needs_data
@pytest.mark.parametrize(
    "name", ["hudson_lynx_hare-lotka_volterra", "one_comp_mm_elim_abs-one_comp_mm_elim_abs"]
)
def test_ode_against_a_finer_grid(name: str) -> None:
    target = load(name)
    samples = points(target, 300)
    if "theta" in samples:
        inputs = torch.cat([samples["theta"], samples["z_init"].log()], -1)
        coarse, fine = lotka_volterra(inputs, 20), lotka_volterra(inputs, 20, steps_per_year=60)
    else:
        inputs = torch.stack([samples[key] for key in ("k_a", "K_m", "V_m")], -1)
        times, *constants = (value for i, value in enumerate(target.args) if i != 1)
        times = times.numpy()
        coarse = michaelis_menten(inputs, times, *constants).log()
        fine = michaelis_menten(inputs, times, *constants, growth=0.05, largest=0.02).log()
    assert (coarse - fine).abs().max() < 1e-6


# --- without ---


def test_without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYRO_FLOWS_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"set PYRO_FLOWS_DATA .*now: None"):
        load("arK-arK")
    monkeypatch.setenv("PYRO_FLOWS_DATA", str(tmp_path))
    (tmp_path / "posteriordb").mkdir()
    with pytest.raises(FileNotFoundError, match="without inference_gym"):
        load("arK-arK")
    (tmp_path / "inference_gym").mkdir()
    assert data_root() == tmp_path


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no target 'nine_schools': expected one of arK-arK"):
        load("nine_schools")


def gamma_target(rate: float) -> Target:
    """Scale s ~ Gamma(3, 2) and x_j ~ N(0, s), with draws as if the rate were `rate`."""

    def model() -> None:
        one = torch.ones((), dtype=torch.float64)
        s = pyro.sample("s", dist.Gamma(3 * one, 2 * one))
        with pyro.plate("J", 2):
            pyro.sample("x", dist.Normal(0 * one, s))

    s = torch.distributions.Gamma(torch.tensor(3.0).double(), torch.tensor(rate).double()).sample(
        (4000,)
    )
    parameters = {"s": s, "x": torch.randn(4000, 2, dtype=torch.float64) * s.unsqueeze(-1)}
    scalars = flatten(parameters)
    mean = {name: value.mean().item() for name, value in scalars.items()}
    sd = {name: value.std().item() for name, value in scalars.items()}
    return Target("gamma", model, (), 3, Reference(mean, sd, parameters, "our own"))


def test_density_of_our_own() -> None:
    target = gamma_target(2.0)
    assert list(target.reference.mean) == ["s", "x[1]", "x[2]"]
    parameters = target.reference.parameters
    assert parameters is not None
    u = target.unconstrain(parameters)
    torch.testing.assert_close(u[:, 0].exp(), parameters["s"])
    s, x = parameters["s"], parameters["x"]
    expected = 2 * s.log() - 2 * s + math.log(8 / 2) + s.log()
    expected = (
        expected
        - 0.5 * (x / s.unsqueeze(-1)).square().sum(-1)
        - 2 * s.log()
        - math.log(2 * math.pi)
    )
    torch.testing.assert_close(target.log_density(u), expected)


def test_stein_sees_a_wrong_model() -> None:
    right, wrong = stein(gamma_target(2.0)), stein(gamma_target(2.3))
    assert right is not None
    assert wrong is not None
    assert max(z.abs().max().item() for z in right) < 4
    assert max(z.abs().max().item() for z in wrong) > 4


def decay(inputs, times):
    """dz = -k z from z_0, and its derivatives by k and z_0."""
    k, z_0 = inputs
    initial = np.stack([z_0, np.zeros_like(k), np.ones_like(k)])[:, None]

    def field(i, w):
        result = -k * w
        if len(w) > 1:
            result[1] -= w[0]
        return result

    return initial, field


def test_solve_and_its_gradient() -> None:
    """z_0 exp(-k t), in a batch of two dimensions."""
    inputs = torch.rand(3, 1, 2, dtype=torch.float64, requires_grad=True)
    problem = Problem(decay, np.linspace(0, 2, 101), np.array([0, 50, 100]))
    k, z_0 = inputs.unbind(-1)
    exact = (
        z_0[..., None] * (-k[..., None] * torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)).exp()
    )
    z = solve(problem, inputs)
    assert z.shape == (3, 1, 3, 1)
    torch.testing.assert_close(z.squeeze(-1), exact, atol=1e-8, rtol=0)
    weights = torch.randn(3, 1, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((z.squeeze(-1) * weights).sum(), inputs)
    (expected,) = torch.autograd.grad((exact * weights).sum(), inputs)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(solve(problem, inputs), z)


@pytest.mark.parametrize("system", ["lotka_volterra", "michaelis_menten"])
def test_gradients_of_the_systems(system: str) -> None:
    if system == "lotka_volterra":
        inputs = torch.tensor([[0.5, 0.03, 0.8, 0.02, 3.4, 1.5]], dtype=torch.float64)

        def function(x):
            return lotka_volterra(x, 3)
    else:
        inputs = torch.tensor([[0.7, 0.4, 1.5]], dtype=torch.float64)

        def function(x):
            return michaelis_menten(x, np.array([0.5, 2.0]), 30.0, 2.0)

    assert torch.autograd.gradcheck(function, inputs.requires_grad_())
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4)


def test_blown_up_particles_have_gradient_zero() -> None:
    inputs = torch.tensor([[0.5, 2.0], [-1e300, 2.0]], dtype=torch.float64, requires_grad=True)
    z = solve(Problem(decay, np.linspace(0, 1, 11), np.array([10])), inputs)
    assert z.isfinite().flatten().tolist() == [True, False]
    z.nan_to_num().sum().backward()
    assert inputs.grad is not None
    assert (inputs.grad[0] != 0).all()
    assert (inputs.grad[1] == 0).all()
