"""Units, whole numbers and faults in the data of `fit_density`: right, or said so."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch

import pyro_flows_ext.transforms as T
from pyro_flows_ext import flows
from pyro_flows_ext.distributions import Density, Dequantized, FlowDistribution
from pyro_flows_ext.infer import fit_density

OPTIONS = {"num_steps": 60, "batch_size": 100, "lr": 0.02, "seed": 0, "progress": False}


def normal(dim=2):
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def flow(dim=2):
    return FlowDistribution(normal(dim), T.nsf(dim, num_layers=2, hidden_dims=(8,)))


def moons(num=600):
    angle = math.pi * torch.rand(num)
    side = torch.randint(0, 2, (num,)) * 2 - 1
    x = torch.stack([angle.cos() - side / 2, side * (angle.sin() - 0.25)], -1)
    return x + 0.1 * torch.randn(num, 2)


@pytest.mark.parametrize(
    ("loc", "scale"),
    [
        ([0.0, 0.0], [1e8, 1e8]),
        ([0.0, 0.0], [1e-8, 1e8]),
        ([300.0, -5e3], [1.0, 1e-2]),
        ([0.0, 0.0], [1e-30, 1e30]),
    ],
    ids=str,
)
def test_the_density_does_not_depend_on_the_units_of_the_data(loc, scale):
    data = moons().double()
    loc, scale = torch.tensor(loc).double(), torch.tensor(scale).double()
    torch.manual_seed(0)
    plain = flow().double()
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    expected = fit_density(plain, data, standardize=True, **OPTIONS)
    other = flow().double()
    other.load_state_dict(state)
    found = fit_density(other, loc + scale * data, **OPTIONS)
    x = data[:50]
    shift = scale.log().sum()
    torch.testing.assert_close(
        other.log_prob(loc + scale * x), plain.log_prob(x) - shift, rtol=1e-4, atol=1e-3
    )
    assert found.best_loss == pytest.approx(expected.best_loss + shift.item(), abs=1e-3)
    assert found.best_loss < found.validation_losses[0] - 0.1
    draws = other.sample((2000,))
    torch.testing.assert_close((draws.mean(0) - loc) / scale, data.mean(0), rtol=0, atol=0.15)


def test_single_precision_and_a_scale_of_1e8():
    density = flow()
    result = fit_density(density, moons() * 1e8, **OPTIONS)
    assert result.best_loss == pytest.approx(2 * math.log(1e8) + 1.8, abs=1.0)


def test_unit_scale_stays_as_it_is():
    density = flow()
    fit_density(density, moons(), **OPTIONS)
    assert density.standardization is None


def test_a_density_trained_in_other_units_keeps_them():
    density = FlowDistribution(normal(), T.ElementwiseAffine(2))
    with torch.no_grad():
        density.transform.log_scale.fill_(math.log(1e4))
    result = fit_density(density, moons() * 1e4, **OPTIONS)
    assert density.standardization is None
    assert result.validation_losses[0] < 2 * math.log(1e4) + 4
    second = flow()
    fit_density(second, moons() * 1e4, **OPTIONS)
    units = second.standardization
    fit_density(second, moons() * 2e4, **OPTIONS)
    assert second.standardization is units


class Fixed(Density):
    """Without units."""

    def __init__(self):
        super().__init__(event_shape=torch.Size([2]))
        self.loc = torch.nn.Parameter(torch.zeros(2))

    def log_prob(self, value):
        return dist.Normal(self.loc, 1e4).to_event(1).log_prob(value)


@pytest.mark.parametrize(
    ("make", "standardize", "message"),
    [
        (flow, False, "standard deviations from .* pass standardize=True"),
        (Fixed, "auto", "standard deviations from .* standardise the data"),
    ],
    ids=["off", "unsupported"],
)
def test_other_units_that_stay_are_warned_of(make, standardize, message):
    with pytest.warns(UserWarning, match=message):
        fit_density(make(), moons() * 1e4, standardize=standardize, **{**OPTIONS, "num_steps": 2})


def test_units_that_cannot_be_set_are_an_error_if_asked_for():
    with pytest.raises(ValueError, match="standardize=True: standardize: Fixed does not support"):
        fit_density(Fixed(), moons(), standardize=True, **OPTIONS)
    bounded = FlowDistribution(normal(), [T.affine_coupling(2), T.LogitPreprocess(0.05, 1).inv])
    with pytest.raises(ValueError, match="expected a density of all real numbers"):
        fit_density(bounded, 0.3 + 0.01 * moons(), standardize=True, **OPTIONS)


def test_a_dtype_too_coarse_for_the_data_is_warned_of():
    data = moons().double() + torch.tensor([1e8, 0.0])
    with pytest.warns(UserWarning, match=r"torch.float32 rounds to .* or call density.double\(\)"):
        fit_density(flow(), data, **{**OPTIONS, "num_steps": 2})
    fit_density(flow().double(), data, **{**OPTIONS, "num_steps": 2})


@pytest.mark.parametrize(("scale", "expected"), [(50.0, True), (2.0, False)])
def test_columns_wider_than_the_layers_are_standardised(scale, expected):
    density = flow()
    fit_density(density, scale * torch.randn(500, 2), **{**OPTIONS, "num_steps": 2})
    assert (density.standardization is not None) == expected


# --- values that repeat ---


def iris_like(num=200):
    return (10 * torch.randn(num, 2)).round() / 10


WARNED = {
    "whole": (torch.randint(0, 30, (200, 2)).float(), r"columns 0, 1 of whole numbers or few distinct .*Dequantized\(density, num_levels=30\)"),
    "integers": (torch.randint(0, 30, (200, 2)), "columns 0, 1 of whole numbers"),
    "negative": (torch.randint(-9, 9, (200, 2)).float(), "columns 0, 1 of whole .*Dequantized, for whole numbers from 0"),
    "two": (torch.stack([torch.randn(200), 0.5 * torch.randint(0, 2, (200,))], -1), "column 1 of whole numbers or few"),
    "constant": (torch.stack([torch.randn(200), torch.full((200,), 3.5)], -1), "column 1 of constant"),
    "one row": (torch.tensor([[0.5, 1.5]]), "columns 0, 1 of constant"),
    "twice": (torch.randn(200, 1) * torch.tensor([1.0, -2.0]), "columns 0, 1 of linear combinations"),
    "sum": ((torch.randn(200, 3) * 50).cumsum(1) @ torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]]), "columns 0, 2, 3 of linear"),
    "mask": (torch.randint(0, 2, (200, 2)).bool(), "columns 0, 1 of whole"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WARNED))
def test_values_that_repeat_are_warned_of(name):
    data, message = WARNED[name]
    with pytest.warns(UserWarning, match=message):
        fit_density(flow(data.shape[1]), data, **{**OPTIONS, "num_steps": 2})


NOT_WARNED = {
    "correlated": torch.randn(200, 1) + 1e-3 * torch.randn(200, 2),
    "real": torch.randn(200, 2),
    "huge": torch.randn(200, 2) * 1e8,  # all whole in single precision
    "rounded": torch.randn(200, 2).round(decimals=2),
    "large whole numbers": (torch.randn(200, 2) * 1e5).round().double(),
    "few rows": torch.randn(3, 2),
    "half": torch.randn(200, 2).half(),
    "bfloat16": torch.randn(2000, 2).bfloat16() + 0.001,
}


@pytest.mark.parametrize("name", list(NOT_WARNED))
def test_real_numbers_are_not_warned_of(name):
    density = flow()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit_density(density, NOT_WARNED[name], **{**OPTIONS, "num_steps": 2})
    assert result.losses.isfinite().all()


def test_whole_numbers_under_noise_are_right():
    density = Dequantized(flow(), num_levels=30)
    result = fit_density(density, torch.randint(0, 30, (200, 2)), **OPTIONS)
    assert result.best_loss < result.validation_losses[0]


# --- faults ---


def with_nan():
    data = torch.randn(100, 2)
    data[17, 1] = math.nan
    data[40] = math.inf
    return data


FAULTS = {
    "nan": (with_nan(), r"data: 3 of 200 values are NaN \(1\) or infinite, the first in row 17 \(data\[17, 1\].*; remove"),
    "range": (torch.tensor([[1.0, 2.0], [1e39, 0.0]], dtype=torch.float64), r"data: 1 of 4 values is infinite, the first in row 1 \(.*once they are torch.float32; .*double"),
    "empty": (torch.zeros(0, 2), r"data: expected at least one row, got shape \(0, 2\)"),
    "scalar": (torch.tensor(1.0), r"data: expected at least one row, got shape \(\)"),
    "shape": (torch.zeros(5, 3), r"data: expected rows \(N, 2\), got \(N, 3\)"),
    "flat": (torch.zeros(5), r"data: expected rows \(N, 2\), got \(N\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FAULTS))
def test_faults_are_named(name):
    data, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        fit_density(flow(), data, **{**OPTIONS, "validation": None})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(5, 2, dtype=torch.complex64), "expected a dense tensor of real numbers, got a complex one"),
        (torch.eye(2).to_sparse(), "expected a dense tensor of real numbers, got a sparse one"),
        ([[1.0, 2.0]], "expected a tensor, an array, a DataFrame, a Dataset or a DataLoader, got a list"),
        ("data.csv", "got a str"),
        (None, "got a NoneType"),
    ],
    ids=["complex", "sparse", "list", "name", "none"],
)  # fmt: skip
def test_other_kinds_of_data_are_refused(data, message):
    with pytest.raises(TypeError, match=message):
        fit_density(flow(), data, **OPTIONS)


@pytest.mark.parametrize("kind", ["strided", "expanded", "transposed", "gradient"])
def test_layouts_do_not_matter(kind):
    data = moons(100)
    views = {
        "strided": torch.stack([data, data], 1).flatten(0, 1)[::2],
        "expanded": data[:, None].expand(100, 3, 2)[:, 1],
        "transposed": data.T.contiguous().T,
        "gradient": data.clone().requires_grad_(),
    }
    losses = []
    for rows in (data, views[kind]):
        torch.manual_seed(0)
        losses.append(fit_density(flow(), rows, **{**OPTIONS, "num_steps": 5}).losses)
    assert torch.equal(*losses)


def test_low_precision_densities_and_autocast_are_refused():
    with pytest.raises(ValueError, match=r"expected parameters of float32 or float64, got torch.bf.*density.float\(\)"):  # fmt: skip
        fit_density(flow().bfloat16(), moons(), **OPTIONS)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"torch.autocast: expected full precision"),
    ):
        fit_density(flow(), moons(), **OPTIONS)


# --- whole numbers and images at a context ---


def halves(num=400):
    """Images 1 x 4 x 4 whose left or right half is bright, as the context has it, and the context."""
    right = torch.randint(0, 2, (num,))
    images = 0.3 * torch.randn(num, 1, 4, 4)
    images[right == 0, :, :, :2] += 2.0
    images[right == 1, :, :, 2:] += 2.0
    return images, torch.nn.functional.one_hot(right, 2).float()


@pytest.mark.parametrize("name", ["Glow", "RealNVPImage", "NSFImage"])
def test_images_follow_their_context(name):
    torch.manual_seed(0)
    images, context = halves()
    density = getattr(flows, name)((1, 4, 4), context_dim=2, num_levels=2, num_layers=2, hidden_dims=(8,))  # fmt: skip
    fit_density(density, images, context, **OPTIONS)
    means = density.condition(torch.eye(2)).sample((200,)).mean((0, 2, 3))
    expected = torch.tensor([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]])
    torch.testing.assert_close(means, expected, rtol=0, atol=0.5)


@pytest.mark.parametrize("logit_alpha", [None, 0.05], ids=["plain", "logit"])
def test_whole_numbers_follow_a_context_in_units_of_its_own(logit_alpha):
    torch.manual_seed(0)
    context = 1000.0 + 100.0 * torch.rand(800, 1)
    counts = torch.distributions.Binomial(10, (context - 1000.0) / 100.0).sample()
    flow = flows.NSF(1, context_dim=1, num_layers=2, hidden_dims=(16,))
    density = Dequantized(flow, num_levels=11, logit_alpha=logit_alpha)
    fit_density(density, counts, context, **{**OPTIONS, "num_steps": 200})
    means = density.condition(torch.tensor([[1020.0], [1080.0]])).sample((1000,)).mean((0, 2))
    torch.testing.assert_close(means, torch.tensor([2.0, 8.0]), rtol=0, atol=0.6)


def test_a_bound_with_a_context_in_units_of_its_own_is_standardised():
    density = flows.CIF(1, context_dim=1, num_layers=2, hidden_dims=(8,))
    fit_density(density, torch.randn(100, 1), 1000 + torch.rand(100, 1), **OPTIONS)
    assert density.context_standardization.loc.item() == pytest.approx(1000.5, abs=0.1)


def test_arrays_in_place_of_tensors_are_named():
    density = flows.NSF(1, context_dim=2)
    with pytest.raises(TypeError, match=r"context: expected a tensor, got a ndarray; convert it"):
        density.condition(torch.zeros(3, 2).numpy())
    with pytest.raises(TypeError, match=r"value: expected a tensor, got a ndarray; convert it"):
        density.condition(torch.zeros(3, 2)).log_prob(torch.zeros(3, 1).numpy())
