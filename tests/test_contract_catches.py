"""The contract suite sees what it is there to see: transforms with one fault each, and the points that find it."""

import pytest
import torch
from torch import nn

from pyro_flows_ext.testing import POINTS, ContractError, check_import_is_pure, perturb
from pyro_flows_ext.transforms import FlowTransform, Planar, conditional_planar


class Scale(FlowTransform):
    """y = exp(s) x: the sound transform that the others spoil."""

    def __init__(self, input_dim):
        super().__init__()
        self.input_dim = input_dim
        self.s = nn.Parameter(torch.zeros(input_dim))

    def forward_and_ladj(self, x):
        return x * self.s.exp(), self.s.sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y):
        return y * (-self.s).exp(), -self.s.sum().expand(y.shape[:-1])


class WrongLadj(Scale):
    """Twice the log-det, both ways: consistent with itself, and wrong."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y, 2 * ladj

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        return x, 2 * ladj


class WrongSign(Scale):
    """Mirrors one coordinate and does not say so in `sign`."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return torch.cat([-y[..., :1], y[..., 1:]], -1), ladj

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(torch.cat([-y[..., :1], y[..., 1:]], -1))


class MissingInverse(FlowTransform):
    def __init__(self, input_dim):
        super().__init__()
        self.input_dim = input_dim
        self.s = nn.Parameter(torch.zeros(input_dim))

    def forward_and_ladj(self, x):
        return x * self.s.exp(), self.s.sum().expand(x.shape[:-1])


class CoarseInverse(Scale):
    """Right to six digits: enough in float32, not in float64."""

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        return x * (1 + 1e-6), ladj


class InverseLadjWithoutMinus(Scale):
    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        return x, -ladj


class SeparateCallDiffers(Scale):
    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 0.5


class RepeatedPass(Scale):
    """No memory: sampling, then scoring, costs two passes."""

    def _store(self, *args, **kwargs):
        pass


class RowCoupling(Scale):
    """Subtracts a mean over the batch, as batch normalisation does in training mode."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y - 0.1 * self._mean(x), ladj

    def inverse_and_ladj(self, y):
        # The mean of x, from that of y = eˢ x - 0.1 mean(x).
        mean = self._mean(y) / (self.s.exp() - 0.1)
        return super().inverse_and_ladj(y + 0.1 * mean)

    def _mean(self, x):
        return x.reshape(-1, x.shape[-1]).mean(0) if x.dim() > 1 else torch.zeros_like(x)


class WrongShape(Scale):
    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y, ladj.unsqueeze(-1)


class SharedDraw(nn.Module):
    """A conditional transform that hides its batch shape, so that all rows get one draw of the base."""

    def __init__(self, input_dim):
        super().__init__()
        self.flow = conditional_planar(input_dim, 2, (4,))

    def condition(self, context):
        transform = self.flow.condition(context)
        transform.batch_shape = torch.Size()
        return transform


class ChangesDtype(Scale):
    """Fills a tensor of the default dtype."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        out = torch.zeros(y.shape)
        out[...] = y
        return out, ladj


class Float32Constant(Scale):
    """A constant with seven digits."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y + torch.tensor(0.1), ladj

    def inverse_and_ladj(self, y):
        return super().inverse_and_ladj(y - torch.tensor(0.1))


class ParameterWithoutGradient(Scale):
    def forward_and_ladj(self, x):
        return x * self.s.detach().exp(), self.s.detach().sum().expand(x.shape[:-1])


class WrongInverseGradient(Scale):
    """Right values, as from a root finder without implicit gradients; the parameter's gradient misses a part."""

    def inverse_and_ladj(self, y):
        return y * (-self.s.detach()).exp(), super().inverse_and_ladj(y)[1]


class MeanGradient(Scale):
    """A backward pass that averages over the batch where it should keep rows apart."""

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y)
        if x.requires_grad and x.dim() == 2:
            x.register_hook(lambda grad: grad.mean(0, keepdim=True).expand_as(grad))
        return x, ladj


class NotPickleable(Scale):
    def __init__(self, input_dim):
        super().__init__(input_dim)
        self.nonlinearity = lambda x: x


class StateAfterUse(Scale):
    """Registers a buffer on first use, so that a fresh module does not know a used one's state."""

    def forward_and_ladj(self, x):
        self.register_buffer("seen", torch.ones(()))
        return super().forward_and_ladj(x)


class CpuOnly(Scale):
    """Makes a tensor without asking for the device."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return y + torch.zeros(self.input_dim, dtype=x.dtype), ladj


class CpuOnlyProduct(Scale):
    """Keeps a matrix that no `.to` moves, in a product that the meta device lets pass."""

    def __init__(self, input_dim):
        super().__init__(input_dim)
        self.eye = [torch.eye(input_dim)]

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return nn.functional.linear(y, self.eye[0].to(x.dtype)), ladj


class MutatedInput(Scale):
    def forward_and_ladj(self, x):
        y = x.mul_(self.s.detach().exp()) * (self.s - self.s.detach()).exp()
        return y, self.s.sum().expand(x.shape[:-1])


class FlagChanger(Scale):
    def forward_and_ladj(self, x):
        self.s.requires_grad_(True)
        return super().forward_and_ladj(x)


class StaleCache(Scale):
    """The cache of `torch.distributions.Transform`: the log-det of the last (x, y), whatever has happened since."""

    def __call__(self, x):
        y, ladj = self.forward_and_ladj(x)
        self.__dict__["_last"] = (x, y, ladj)
        return y

    def log_abs_det_jacobian(self, x, y):
        x_last, y_last, ladj = self.__dict__.get("_last", (None, None, None))
        return ladj if x is x_last and y is y_last else super().log_abs_det_jacobian(x, y)

    def _inv_call(self, y):
        x_last, y_last, _ = self.__dict__.get("_last", (None, None, None))
        return x_last if y is y_last else super()._inv_call(y)

    def __getstate__(self):
        return {k: v for k, v in super().__getstate__().items() if k != "_last"}


class DataDependentBranch(Scale):
    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return (y if x.sum() > 0 else y + 0.0), ladj


class LostMass(Scale):
    """Scales by a factor that its log-det does not have: the density integrates to 1.2^-2."""

    def forward_and_ladj(self, x):
        y, ladj = super().forward_and_ladj(x)
        return 1.2 * y, ladj + 4 * torch.tensor(1.2, dtype=x.dtype).log()

    def inverse_and_ladj(self, y):
        x, ladj = super().inverse_and_ladj(y / 1.2)
        return x, ladj - 4 * torch.tensor(1.2, dtype=y.dtype).log()


class SumOverPlate(Scale):
    """A log-det summed over the batch: a plate that subsamples scales the wrong number."""

    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y).sum().expand(x.shape[:-1])


# fault -> the points that find it, its own first. Every other point passes.
FAULTS = {
    MissingInverse: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16],
    CoarseInverse: [1, 2, 16],
    WrongLadj: [2, 14],
    WrongSign: [2],
    LostMass: [14, 2],
    InverseLadjWithoutMinus: [3, 2, 4, 14, 16],
    SeparateCallDiffers: [4, 14, 16],
    RepeatedPass: [4],
    RowCoupling: [5, 8],
    WrongShape: [5, 2, 3, 4, 16],
    ChangesDtype: [6, 1, 7, 10, 16],
    Float32Constant: [6],
    ParameterWithoutGradient: [7],
    WrongInverseGradient: [7],
    MeanGradient: [8, 7],
    NotPickleable: [9],
    StateAfterUse: [9, 11, 12],
    CpuOnly: [10],
    CpuOnlyProduct: [10],
    MutatedInput: [11, 2, 5, 6, 7, 9, 10, 12, 13, 16],
    FlagChanger: [11],
    StaleCache: [12, 4],
    DataDependentBranch: [13, 10],
    SumOverPlate: [16, 4, 14],
}


def cases(found):
    return [
        pytest.param(fault, point, id=f"{fault.__name__}-{point}")
        for fault, numbers in FAULTS.items()
        for point in POINTS.values()
        if (point.number in numbers) == found and (found or point.number != 13)
    ]


@pytest.mark.parametrize(("fault", "point"), cases(found=True))
def test_fault_is_found(fault, point):
    with pytest.raises(ContractError) as caught:
        point.check(lambda: fault(2))
    assert caught.value.number == point.number
    assert str(caught.value).startswith(f"point {point.number} (")


@pytest.mark.parametrize(("fault", "point"), cases(found=False))
def test_other_points_pass(fault, point):
    point.check(lambda: fault(2))


@pytest.mark.parametrize("point", POINTS.values(), ids=str)
def test_the_sound_transform_passes(point):
    for dtype in point.dtypes:
        point.check(lambda: Scale(2), dtype=dtype)


def test_a_hidden_batch_shape_is_found():
    with pytest.raises(ContractError, match=r"point 5 \(batch shapes\)"):
        POINTS[5].check(lambda: SharedDraw(2), context_dim=2, event_shape=(2,))


def test_message_has_the_error_and_the_tolerance():
    with pytest.raises(ContractError, match=r"float64, .*: error 8\S*e-07, tolerance 1e-09"):
        POINTS[1].check(lambda: CoarseInverse(2))
    POINTS[1].check(lambda: CoarseInverse(2), dtype=torch.float32)


def test_density_refuses_three_dimensions():
    with pytest.raises(ValueError, match=r"at most|one or two numbers, got shape \(3,\)"):
        POINTS[14].check(lambda: Scale(3))


def test_perturb_divides_matrices_by_the_square_root_of_fan_in():
    module = nn.Linear(400, 300)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    assert perturb(module, generator=torch.Generator().manual_seed(0)) is module
    assert module.weight.std().item() == pytest.approx(0.7 / 20, rel=0.02)
    assert module.bias.std().item() == pytest.approx(0.7, rel=0.2)


def test_checks_leave_the_random_state_alone():
    before = torch.get_rng_state()
    for number in (1, 5, 9, 14, 16):
        POINTS[number].check(lambda: Planar(2))
    assert torch.equal(before, torch.get_rng_state())


IMPURE = """
import matplotlib, pyro, random, torch, warnings
from torch.optim.optimizer import register_optimizer_step_post_hook
torch.set_default_dtype(torch.float64)
torch.set_num_threads(3)
torch.rand(1)
random.random()
torch.set_grad_enabled(False)
pyro.enable_validation(False)
register_optimizer_step_post_hook(print)
pyro.param("p", torch.ones(()))
warnings.simplefilter("ignore")
"""


def import_message(folder, source):
    package = folder / "guest"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with pytest.raises(ContractError, match=r"point 15 \(import is pure\)") as caught:
            check_import_is_pure("guest")
    return str(caught.value)


@pytest.fixture(scope="module")
def impure_message(tmp_path_factory):
    return import_message(tmp_path_factory.mktemp("impure"), IMPURE)


@pytest.mark.parametrize(
    "name",
    [
        "default dtype",
        "threads",
        "random state of torch",
        "random state of python",
        "grad mode",
        "validation of pyro",
        "validation of distributions",
        "optimizer hooks",
        "parameter store",
        "warning filters",
        "matplotlib",
    ],
)
def test_impure_import_is_found(impure_message, name):
    assert f"'{name}'" in impure_message


@pytest.mark.parametrize("name", ["random state of numpy", "deterministic mode", "arviz"])
def test_what_stayed_is_not_named(impure_message, name):
    assert f"'{name}'" not in impure_message


def test_broken_import_is_found(tmp_path):
    assert "No module named 'nothing_of_this_name'" in import_message(
        tmp_path, "import nothing_of_this_name"
    )
