"""What prepares images for a flow: squeezing, logits, standardisation."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

from pyro_flows_ext.transforms import (
    ComposeFlow,
    LogitPreprocess,
    Pixelwise,
    Squeeze,
    Standardize,
    affine_coupling,
    planar,
)
from pyro_flows_ext.transforms.permute import parity

# --- squeeze ---


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5), (0,)], ids=str)
def test_squeeze_moves_blocks_to_channels(factor, batch):
    C, H, W = 2, 2, 3
    x = torch.randn(*batch, C, H * factor, W * factor)
    y, ladj = Squeeze(factor).forward_and_ladj(x)
    assert y.shape == (*batch, C * factor**2, H, W)
    assert ladj.shape == batch
    assert not ladj.any()
    for i in range(factor):
        for j in range(factor):
            channels = y[..., i * factor + j :: factor**2, :, :]
            assert torch.equal(channels, x[..., i::factor, j::factor])
    back, ladj = Squeeze(factor).inverse_and_ladj(y)
    assert torch.equal(back, x)
    assert ladj.shape == batch
    assert torch.equal(Squeeze(factor).inv(y), x)


def test_squeeze_shapes():
    transform = Squeeze(2)
    assert transform.forward_shape((7, 3, 4, 6)) == (7, 12, 2, 3)
    assert transform.inverse_shape((7, 12, 2, 3)) == (7, 3, 4, 6)
    assert Squeeze(3).inv.forward_shape((9, 1, 2)) == (1, 3, 6)
    stack = ComposeFlow([transform, transform, Pixelwise(planar(16)), transform.inv])
    assert stack.forward_shape((5, 1, 8, 4)) == (5, 4, 4, 2)
    assert stack.inverse_shape((5, 4, 4, 2)) == (5, 1, 8, 4)
    base = dist.Normal(torch.zeros(1, 8, 4), 1.0).to_event(3)
    flow = dist.TransformedDistribution(base, [stack])
    assert flow.event_shape == (4, 4, 2)
    assert flow.log_prob(flow.sample((3,))).shape == (3,)


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 3), (4, 4)], ids=str)
def test_squeeze_refuses_what_it_cannot_divide(shape):
    for run in (Squeeze(2), lambda x: Squeeze(2).forward_shape(x.shape)):
        with pytest.raises(
            ValueError, match=r"Squeeze\(2\): expected .* H and W divisible by 2, got"
        ):
            run(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(6, 2, 2), (2, 2, 2), (4, 4)], ids=str)
def test_unsqueeze_refuses_what_it_cannot_divide(shape):
    for run in (Squeeze(2).inv, lambda x: Squeeze(2).inverse_shape(x.shape)):
        with pytest.raises(
            ValueError, match=r"Squeeze\(2\).inv: expected .* C divisible by 4, got"
        ):
            run(torch.zeros(shape))


@pytest.mark.parametrize("factor", [0, -1, 1.5])
def test_squeeze_refuses_other_factors(factor):
    with pytest.raises(ValueError, match="factor: expected a positive integer"):
        Squeeze(factor)


@pytest.mark.parametrize("factor", range(1, 8))
def test_sign_of_squeeze_is_the_parity_of_its_permutation(factor):
    signs = set()
    for h, w in [(1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]:
        x = torch.arange(factor**2 * h * w).reshape(1, factor * h, factor * w)
        signs.add(parity(Squeeze(factor).forward_and_ladj(x.float())[0].flatten()))
    assert Squeeze(factor).sign == (signs.pop() if len(signs) == 1 else 0)


# --- logits ---


@pytest.mark.parametrize("alpha", [0.3, 0.05, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logit_preprocess_formula_up_to_the_ends(alpha, dtype):
    x = torch.tensor([0.0, 1e-7, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-3, 1 - 2**-23, 1.0], dtype=dtype)
    y, ladj = LogitPreprocess(alpha, event_dim=1).forward_and_ladj(x.unsqueeze(-1))
    exact = [float(value) for value in x]
    s = [alpha + (1 - 2 * alpha) * value for value in exact]
    rest = [alpha + (1 - 2 * alpha) * (1 - value) for value in exact]
    both = list(zip(s, rest, strict=True))
    expected = torch.tensor([math.log(a / b) for a, b in both], dtype=dtype)
    torch.testing.assert_close(y.squeeze(-1), expected)
    expected = torch.tensor([math.log((1 - 2 * alpha) / a / b) for a, b in both], dtype=dtype)
    torch.testing.assert_close(ladj, expected)


@pytest.mark.parametrize("y", [-40.0, -2.0, 0.0, 3.0, 40.0])
def test_logit_preprocess_inverse_formula_far_out(y):
    alpha, y = 0.05, torch.tensor([y], dtype=torch.float64)
    x, ladj = LogitPreprocess(alpha, event_dim=1).inverse_and_ladj(y)
    s = math.exp(-math.log1p(math.exp(-y.item())))
    torch.testing.assert_close(x.item(), (s - alpha) / (1 - 2 * alpha))
    expected = -abs(y.item()) - 2 * math.log1p(math.exp(-abs(y.item()))) - math.log(1 - 2 * alpha)
    torch.testing.assert_close(ladj.item(), expected)


def test_logit_preprocess_maps_the_data_to_an_interval_and_the_line_to_the_domain():
    transform = LogitPreprocess(0.05)
    assert (transform.domain.event_dim, transform.codomain.event_dim) == (3, 3)
    y = transform(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)).flatten()
    torch.testing.assert_close(y, torch.tensor([-1.0, 1.0]) * math.log(0.95 / 0.05))
    x = transform.inv(torch.tensor([-15.0, 15.0]).reshape(2, 1, 1, 1))
    torch.testing.assert_close(x.flatten(), torch.tensor([-0.05 / 0.9, 0.95 / 0.9]))
    assert transform.domain.check(x).all()
    assert transform.domain.check(torch.zeros(1, 1, 1))
    assert not transform.domain.check(torch.full((1, 1, 1), 1.1))


def test_every_draw_can_be_scored():
    base = dist.Normal(torch.zeros(1, 2, 2), 4.0, validate_args=True).to_event(3)
    flow = dist.TransformedDistribution(base, [LogitPreprocess().inv], validate_args=True)
    draws = flow.sample((500,))
    assert (draws < 0).any()  # outside of the data, inside of the support
    assert flow.log_prob(draws.clone()).isfinite().all()
    with pytest.raises(ValueError, match="support"):
        flow.log_prob(draws + 1.2)


@pytest.mark.parametrize("alpha", [0.2, 1e-3])
def test_density_of_data_integrates_to_one(alpha):
    base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
    transform = LogitPreprocess(alpha, event_dim=1)
    flow = dist.TransformedDistribution(base, [transform.inv])
    reach = alpha / (1 - 2 * alpha)
    middle = (torch.arange(1500).double() + 0.5) / 1500 * (1 + 2 * reach) - reach
    density = flow.log_prob(torch.cartesian_prod(middle, middle)).exp()
    total = density.mean() * (1 + 2 * reach) ** 2
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.1, float("nan")])
def test_logit_preprocess_refuses_other_alphas(alpha):
    with pytest.raises(ValueError, match="alpha: expected a number between 0 and 1/2"):
        LogitPreprocess(alpha)


def test_logit_preprocess_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"x: expected 3 event dimensions, got shape \(2, 2\)"):
        LogitPreprocess()(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="event_dim: expected a positive integer"):
        LogitPreprocess(event_dim=0)


# --- standardisation ---


@pytest.mark.parametrize(
    ("event", "per_channel", "shape"),
    [
        ((4,), False, (4,)),
        ((3, 2, 5), False, (3, 2, 5)),
        ((3, 2, 5), True, (3, 1, 1)),
    ],
    ids=["vector", "pixel", "channel"],
)
@pytest.mark.parametrize("batch", [(50,), (5, 10)], ids=str)
def test_from_data_standardises(event, per_channel, shape, batch):
    C = event[0]
    scale = torch.linspace(0.1, 5, C).double().reshape(C, *[1] * (len(event) - 1))
    data = torch.randn(*batch, *event).double() * scale + 3 * scale
    transform = Standardize.from_data(data, len(event), per_channel=per_channel)
    assert transform.loc.shape == transform.scale.shape == shape
    assert transform.loc.dtype == torch.float64
    y, ladj = transform.forward_and_ladj(data)
    dims = [*range(len(batch)), *([-2, -1] if per_channel else [])]
    torch.testing.assert_close(y.mean(dims), torch.zeros_like(y.mean(dims)))
    torch.testing.assert_close(y.std(dims, correction=0), torch.ones_like(y.mean(dims)))
    torch.testing.assert_close(ladj, -transform.scale.expand(event).log().sum().expand(batch))
    assert not list(transform.parameters())


def test_standardize_of_a_normal_is_a_normal():
    loc, scale = torch.randn(3, 1, 1).double(), torch.rand(3, 1, 1).double() + 0.2
    base = dist.Normal(torch.zeros(3, 2, 2).double(), 1.0).to_event(3)
    flow = dist.TransformedDistribution(base, [Standardize(loc, scale).inv])
    x = torch.randn(5, 3, 2, 2).double()
    expected = dist.Normal(loc.expand(3, 2, 2), scale).to_event(3).log_prob(x)
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_constant_columns_keep_their_scale():
    data = torch.randn(20, 3)
    data[:, 1] = 7.0
    transform = Standardize.from_data(data)
    assert transform.scale[1] == 1
    torch.testing.assert_close(transform(data)[:, 1], torch.zeros(20))


def test_moments_are_a_copy_in_the_state():
    loc, scale = torch.zeros(3), torch.ones(3)
    transform = Standardize(loc, scale)
    loc.fill_(1.0)
    assert not transform.loc.any()
    other = Standardize(torch.ones(3), 2 * torch.ones(3))
    other.load_state_dict(transform.state_dict())
    assert torch.equal(other(torch.ones(3)), torch.ones(3))


def test_event_dim_of_a_scalar_scale():
    transform = Standardize(torch.tensor(1.0), torch.tensor(2.0), event_dim=3)
    y, ladj = transform.forward_and_ladj(torch.full((5, 1, 2, 3), 3.0))
    assert torch.equal(y, torch.ones(5, 1, 2, 3))
    torch.testing.assert_close(ladj, torch.full((5,), -6 * math.log(2.0)))
    assert transform.domain.event_dim == 3
    assert biject_to(transform.codomain).domain.event_dim == 3


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        (torch.zeros(3), torch.ones(2), "loc, scale: expected the same shape"),
        (torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1), "of at most 3 dimensions"),
        (torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]), "scales above 0"),
        (torch.zeros(3), torch.tensor([1.0, torch.inf, 1.0]), "expected finite values"),
        (torch.full((3,), torch.nan), torch.ones(3), "expected finite values"),
    ],
)
def test_standardize_refuses(loc, scale, message):
    with pytest.raises(ValueError, match=message):
        Standardize(loc, scale, event_dim=3)


def test_standardize_refuses_other_shapes_and_data():
    transform = Standardize(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(
        ValueError, match=r"x: .* loc of shape \(3, 1, 1\) broadcasts to, got \(5, 4"
    ):
        transform(torch.zeros(5, 4, 2, 2))
    with pytest.raises(ValueError, match=r"y: expected 3 event dimensions, got shape \(2, 2\)"):
        transform.inv(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="batch: expected at least 2 rows"):
        Standardize.from_data(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expected finite values"):
        Standardize.from_data(torch.full((4, 3), torch.nan))


def test_a_flow_of_images_in_data_space():
    """Squeeze, coupling and logits together: the log-det of the whole is that of its Jacobian."""
    stack = ComposeFlow(
        [Squeeze(2), affine_coupling((4, 1, 2), (3,)), Squeeze(2).inv, LogitPreprocess().inv]
    ).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 2, 4).double()
    jacobian = torch.autograd.functional.jacobian(stack._call, x).reshape(8, 8)
    torch.testing.assert_close(stack.forward_and_ladj(x)[1], torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (Squeeze(3), "Squeeze(3)"),
        (Squeeze(2).inv, "Squeeze(2).inv"),
        (LogitPreprocess(1e-6, event_dim=1), "LogitPreprocess(alpha=1e-06, event_dim=1)"),
        (Standardize(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)), "Standardize((3, 1, 1))"),
    ],
    ids=str,
)
def test_repr(transform, expected):
    assert repr(transform) == expected
