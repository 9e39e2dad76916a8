"""The contract suite sees what it is there to see, and nothing else: each fault on its own points."""

import pytest
import torch
from faults import FAULTS, CoarseInverse, Scale, SharedDraw
from torch import nn

from pyro_flows_ext.testing import POINTS, ContractError, check_import_is_pure, perturb
from pyro_flows_ext.transforms import Planar


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


def test_perturb_counts_all_inputs_of_a_convolution():
    module = nn.Conv2d(20, 30, 3)
    nn.init.zeros_(module.weight)
    perturb(module, generator=torch.Generator().manual_seed(0))
    assert module.weight.std().item() == pytest.approx(0.7 / 180**0.5, rel=0.05)


def test_a_sign_of_zero_claims_nothing():
    class Unsigned(Scale):
        sign = 0

    class Reversed(Scale):
        sign = -1

    POINTS[2].check(lambda: Unsigned(2))
    with pytest.raises(ContractError, match="sign -1, but the determinant's is"):
        POINTS[2].check(lambda: Reversed(2))


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
