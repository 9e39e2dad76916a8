import math

import pytest
import torch
from torch import Tensor, nn

from pyro_flows_ext.diagnostics import (
    LipschitzEstimate,
    jacobian_condition_number,
    lipschitz_estimate,
    round_trip_error,
)
from pyro_flows_ext.transforms import (
    ActNorm,
    BatchNorm,
    ComposeFlow,
    Coupling,
    ElementwiseAffine,
    FlowTransform,
    HouseholderLinear,
    Invertible1x1Conv,
    Permute,
    Squeeze,
    Whitening,
    planar,
    realnvp,
    residual,
)

DIAGNOSTICS = [jacobian_condition_number, lipschitz_estimate, round_trip_error]
any_diagnostic = pytest.mark.parametrize("diagnostic", DIAGNOSTICS, ids=lambda f: f.__name__)


def scaling(*scales: float, dtype: torch.dtype = torch.float64) -> ElementwiseAffine:
    """x -> scales ⊙ x."""
    transform = ElementwiseAffine(len(scales)).to(dtype)
    with torch.no_grad():
        transform.log_scale.copy_(torch.tensor(scales, dtype=torch.float64).log())
    return transform


class Linear(FlowTransform):
    """y = A x, for any A."""

    def __init__(self, A: Tensor):
        super().__init__()
        self.A = nn.Parameter(A)

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj = torch.linalg.slogdet(self.A)[1]
        return x @ self.A.mT, ladj.expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        ladj = torch.linalg.slogdet(self.A)[1]
        return torch.linalg.solve(self.A, y.unsqueeze(-1)).squeeze(-1), -ladj.expand(y.shape[:-1])


def test_a_linear_map_by_its_singular_values() -> None:
    U, V = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64))[0]
    transform = Linear(U @ torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.25]).double()) @ V)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        jacobian_condition_number(transform, x), torch.full((2, 3), 20.0).double()
    )
    assert lipschitz_estimate(transform, x) == pytest.approx((5.0, 4.0))
    assert lipschitz_estimate(transform.inv, x) == pytest.approx((4.0, 5.0))


@pytest.mark.parametrize(
    ("transform", "kappa", "constants"),
    [
        (scaling(8.0, 2.0, 0.5), 16.0, (8.0, 2.0)),
        (Permute([2, 0, 1]), 1.0, (1.0, 1.0)),
        (HouseholderLinear(3).double(), 1.0, (1.0, 1.0)),
        (ComposeFlow([scaling(4.0, 1.0, 1.0), Permute([1, 0, 2])]), 4.0, (4.0, 1.0)),
    ],
    ids=["scaling", "permutation", "reflections", "chain"],
)
def test_closed_forms(
    transform: FlowTransform, kappa: float, constants: tuple[float, float]
) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(
        jacobian_condition_number(transform, x), torch.full((5,), kappa).double()
    )
    estimate = lipschitz_estimate(transform, x)
    assert isinstance(estimate, LipschitzEstimate)
    assert (estimate.forward, estimate.inverse) == pytest.approx(constants)


def test_a_planar_layer_varies_by_row() -> None:
    """Df = I + h u wᵀ with u along w: singular values 1 and 1 + h wᵀu, of the slope h = 1 - tanh²(wᵀx + b)."""
    transform = planar(2).double()
    w = torch.tensor([0.6, 0.8], dtype=torch.float64)
    with torch.no_grad():
        transform.w.copy_(w.expand_as(transform.w))
        transform.u.copy_(3 * w.expand_as(transform.u))
        transform.b.zero_()
    x = torch.randn(7, 2, dtype=torch.float64)
    slope = 1 + 3 * (1 - (x @ w).tanh() ** 2)
    torch.testing.assert_close(jacobian_condition_number(transform, x), slope)
    estimate = lipschitz_estimate(transform, x)
    assert estimate == pytest.approx((slope.max().item(), 1.0))
    crest = lipschitz_estimate(transform, torch.zeros(1, 2, dtype=torch.float64))
    assert crest.forward == pytest.approx(4.0)  # the supremum, which no row of x reaches
    assert estimate.forward < crest.forward


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_rows_are_looked_at_one_by_one(batch: tuple[int, ...]) -> None:
    transform = realnvp(3, num_layers=4, hidden_dims=(8,)).double()
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(*batch, 3, dtype=torch.float64)

    def one(row: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda v: transform._call(v), row)
        return torch.linalg.cond(jacobian)

    expected = torch.stack([one(row) for row in x.reshape(-1, 3)]).reshape(batch)
    assert expected.max() > 1.5  # no identity
    torch.testing.assert_close(jacobian_condition_number(transform, x), expected)
    singular = lipschitz_estimate(transform, x)
    assert singular.forward * singular.inverse >= expected.max().item() * (1 - 1e-9)
    error = round_trip_error(transform, x)
    assert error.shape == batch
    assert error.max() < 1e-9


def test_images_count_as_one_vector() -> None:
    transform = ComposeFlow([Squeeze(), Invertible1x1Conv(4)]).double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3, 1, 2, 4, dtype=torch.float64)
    # A 1 x 1 convolution has the singular values of its matrix, each once a pixel.
    conv = transform[1].forward_and_ladj(torch.eye(4, dtype=torch.float64).reshape(4, 4, 1, 1))[0]
    offset = transform[1].forward_and_ladj(torch.zeros(1, 4, 1, 1, dtype=torch.float64))[0]
    singular = torch.linalg.svdvals((conv - offset).flatten(1))
    torch.testing.assert_close(
        jacobian_condition_number(transform, x), (singular[0] / singular[-1]).detach().expand(3)
    )
    expected = (singular[0].item(), 1 / singular[-1].item())
    assert lipschitz_estimate(transform, x) == pytest.approx(expected)
    assert round_trip_error(transform, x).shape == (3,)


@pytest.mark.parametrize(
    "conditional",
    [ElementwiseAffine(2, context_dim=1), Coupling(2, (4,), context_dim=1)],
    ids=["hyper-network", "network input"],
)
def test_contexts_in_a_batch(conditional: nn.Module) -> None:
    conditional = conditional.double()
    for parameter in conditional.parameters():
        nn.init.normal_(parameter)
    context, x = torch.randn(2, 5, 1, 1).double(), torch.randn(2, dtype=torch.float64)
    transform = conditional.condition(context.squeeze(-1).unsqueeze(-1))
    assert transform.batch_shape == (2, 5, 1)
    for diagnostic in (jacobian_condition_number, round_trip_error):
        actual = diagnostic(transform, x.expand(3, 2))  # broadcast: 3 inputs at each context
        assert actual.shape == (2, 5, 3)
        alone = diagnostic(conditional.condition(context[1, 4]), x)
        torch.testing.assert_close(actual[1, 4, 0], alone.squeeze(), rtol=1e-9, atol=1e-12)
    rows = jacobian_condition_number(transform, x)
    assert len(rows.unique()) == 10
    singles = [lipschitz_estimate(conditional.condition(c), x) for c in context.reshape(-1, 1)]
    assert lipschitz_estimate(transform, x) == pytest.approx(
        (max(s.forward for s in singles), max(s.inverse for s in singles))
    )


# --- float32 ---


def test_digits_are_lost_in_the_way_that_squeezes() -> None:
    """x + 1 shrunk to 1e-6 and set beside 1 keeps a step of 2⁻²³ there, which is 0.12 on the way back."""
    squeeze = ComposeFlow([scaling(1e-6, 1.0, dtype=torch.float32), ElementwiseAffine(2)])
    with torch.no_grad():
        squeeze[1].loc.fill_(1.0)
    x = torch.randn(200, 2)
    error = round_trip_error(squeeze, x)
    assert 0.02 < error.max() <= 0.07  # half a step
    assert round_trip_error(squeeze.inv, squeeze(x)).max() < 1e-6  # the other order loses nothing
    assert round_trip_error(squeeze.double(), x.double()).max() < 1e-9


def test_a_map_that_float32_cannot_invert() -> None:
    """A singular value below rounding: every digit of one direction is lost, and the numbers say so."""
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-9]], dtype=torch.float64)
    exact = Linear(A)
    x = torch.randn(20, 2, dtype=torch.float64)
    kappa = jacobian_condition_number(exact, x)
    torch.testing.assert_close(kappa, torch.full((20,), 4e9).double(), rtol=1e-5, atol=0.0)
    rounded = scaling(1.0, 1e-9, dtype=torch.float32)
    merged = ComposeFlow([rounded, ElementwiseAffine(2)])
    with torch.no_grad():
        merged[1].loc.fill_(1.0)
    assert round_trip_error(merged, torch.randn(50, 2)).median() > 0.1
    assert jacobian_condition_number(merged, torch.randn(50, 2)).min() > 1e8


def test_zero_slopes_are_infinitely_ill_conditioned() -> None:
    transform = scaling(1.0, 1e-60, dtype=torch.float32)  # exp(-138) is zero in float32
    x = torch.randn(3, 2)
    assert jacobian_condition_number(transform, x).tolist() == [math.inf] * 3
    assert lipschitz_estimate(transform, x) == (1.0, math.inf)
    assert round_trip_error(transform, x).tolist() == [math.inf] * 3  # 0 · ∞
    assert round_trip_error(transform.inv, x).tolist() == [math.inf] * 3  # x / 0 on the way there


def test_overflow_is_an_infinite_error() -> None:
    transform = scaling(1e30, 1.0, dtype=torch.float32)
    x = torch.tensor(
        [[1e20, 1.0], [1.0, 1.0]]
    )  # the first overflows, and comes back infinite, not NaN
    error = round_trip_error(transform, x)
    assert error[0] == math.inf
    assert error[1] < 1e-5


def test_rows_that_overflow_spoil_no_others() -> None:
    transform = planar(2)
    x = torch.tensor([[0.1, 0.2], [math.nan, 0.0], [0.3, -0.4]])
    kappa = jacobian_condition_number(transform, x)
    assert kappa.isnan().tolist() == [False, True, False]
    assert round_trip_error(transform, x).isinf().tolist() == [False, True, False]
    assert all(math.isnan(constant) for constant in lipschitz_estimate(transform, x))


# --- what they leave alone, and what they refuse ---


@any_diagnostic
def test_training_mode_is_left_and_restored(diagnostic) -> None:
    batchnorm, actnorm = BatchNorm(2), ActNorm(2, initialize_on_first_batch=True)
    transform = ComposeFlow([batchnorm, actnorm.eval(), residual(2, num_layers=1)])
    modes = [module.training for module in transform.modules()]
    before = {name: value.clone() for name, value in transform.state_dict().items()}
    diagnostic(transform, torch.randn(5, 2))
    diagnostic(transform.inv, torch.randn(5, 2))
    assert [module.training for module in transform.modules()] == modes
    assert any(modes)
    assert not all(modes)
    for name, value in transform.state_dict().items():
        assert torch.equal(value, before[name]), name


@any_diagnostic
def test_the_mode_is_restored_after_an_error(diagnostic) -> None:
    transform = realnvp(3, num_layers=1)
    with pytest.raises(ValueError):
        diagnostic(transform, torch.randn(5, 4))
    assert transform.training


@pytest.mark.parametrize("diagnostic", [jacobian_condition_number, round_trip_error])
def test_no_graph_comes_back(diagnostic) -> None:
    transform = realnvp(2, num_layers=2)
    result = diagnostic(transform, torch.randn(3, 2, requires_grad=True))
    assert not result.requires_grad
    assert all(parameter.grad is None for parameter in transform.parameters())
    with torch.no_grad():
        assert diagnostic(transform, torch.randn(3, 2)).isfinite().all()


@any_diagnostic
def test_refusals(diagnostic) -> None:
    conditional = Coupling(2, (4,), context_dim=1)
    with pytest.raises(ValueError, match=r"condition\(context\)"):
        diagnostic(conditional, torch.randn(3, 2))
    with pytest.raises(TypeError, match="expected a FlowTransform, got a Linear"):
        diagnostic(nn.Linear(2, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="event dimensions"):
        diagnostic(realnvp(2, num_layers=1), torch.tensor(1.0))
    transform = conditional.condition(torch.randn(4, 1))
    with pytest.raises(ValueError, match="expected a batch that broadcasts"):
        diagnostic(transform, torch.randn(3, 2))


class Doubling(FlowTransform):
    """x -> (x, x), which has no inverse."""

    def forward_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, x], -1), x.new_zeros(x.shape[:-1])


@pytest.mark.parametrize("diagnostic", [jacobian_condition_number, lipschitz_estimate])
def test_jacobians_that_are_not_square(diagnostic) -> None:
    with pytest.raises(ValueError, match="got 4 for 2"):
        diagnostic(Doubling(), torch.randn(3, 2))


def test_no_rows() -> None:
    transform, x = realnvp(2, num_layers=1), torch.zeros(0, 2)
    assert jacobian_condition_number(transform, x).shape == (0,)
    assert round_trip_error(transform, x).shape == (0,)
    with pytest.raises(ValueError, match="at least one row"):
        lipschitz_estimate(transform, x)


def test_whitening_without_parameters() -> None:
    scale_tril = torch.tensor([[2.0, 0.0], [1.0, 0.5]]).double()
    transform = Whitening(torch.zeros(2).double(), scale_tril)
    singular = torch.linalg.svdvals(scale_tril)
    estimate = lipschitz_estimate(transform, torch.randn(4, 2).double())
    assert sorted(estimate) == pytest.approx(sorted([singular[0].item(), 1 / singular[1].item()]))
