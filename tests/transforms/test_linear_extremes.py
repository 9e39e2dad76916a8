"""Linear layers at any parameter value, and permutations."""

import itertools

import pytest
import torch
from linear_layers import EVERY, D, diagonal, matrix_of

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    ComposeFlow,
    HouseholderLinear,
    LULinear,
    Permute,
    QRLinear,
    permute,
)

# --- any parameter value ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [50.0, -50.0])
@pytest.mark.parametrize(
    ("make", "name"), [(LULinear, "lu"), (QRLinear, "r")], ids=["LULinear", "QRLinear"]
)
def test_extreme_diagonal(make, name, value, dtype):
    t = perturb(make(D).double())
    raw = getattr(t, name).data
    raw.diagonal()[1] = value
    t = t.to(dtype)
    x = torch.randn(10, D, dtype=torch.float64).to(dtype)
    y, ladj = t.forward_and_ladj(x)
    expected = diagonal(raw.diagonal()).log().sum()
    torch.testing.assert_close(ladj.double(), expected.expand(10), rtol=0, atol=1e-4)
    back, _ = t.inverse_and_ladj(y)
    # A slope of 1e-3 costs three digits, and rounding a few more.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    out = t.inverse_and_ladj(torch.randn(10, D, dtype=dtype))
    for grad in torch.autograd.grad(sum(o.sum() for o in out), list(t.parameters())):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [50.0, -50.0])
@EVERY
def test_all_parameters_extreme(make, value, dtype):
    t = make().to(dtype)
    with torch.no_grad():
        for p in t.parameters():
            p.add_(value)
    y, ladj = t.forward_and_ladj(torch.randn(3, D, dtype=dtype))
    # Not log|det| of the matrix: its condition number goes up to 1e20 here.
    raw = getattr(t, "lu", getattr(t, "r", None))
    expected = 0.0 if raw is None else diagonal(raw.detach().diagonal().double()).log().sum().item()
    torch.testing.assert_close(
        ladj.double(), torch.full((3,), expected).double(), rtol=1e-4, atol=1e-6
    )
    assert y.isfinite().all()
    assert t.inverse_and_ladj(y)[0].isfinite().all()


@pytest.mark.parametrize("make", [HouseholderLinear, QRLinear])
@pytest.mark.parametrize(
    ("row", "sign"),
    [([0.0] * D, -1), ([1e-160] * D, -1), ([1e150] * D, 1), ([0.0, 0.0, 1.0, 0.0], 1)],
    ids=["zero", "tiny", "huge", "axis"],
)
def test_any_reflection_vector(make, row, sign):
    t = make(D, num_reflections=2).double()
    with torch.no_grad():
        t.v[1] = torch.tensor(row, dtype=torch.float64)
    W, _ = matrix_of(t)
    torch.testing.assert_close(W @ W.mT, torch.eye(D, dtype=W.dtype), rtol=0, atol=1e-14)
    assert t.sign == sign
    assert torch.linalg.slogdet(W)[0] == sign
    (grad,) = torch.autograd.grad((W * torch.randn_like(W)).sum(), t.v)
    assert grad.isfinite().all()


def test_sign_is_one_a_row_of_a_batch_of_parameters():
    v = torch.randn(3, 2, D)
    v[1, 0] = 0
    t = HouseholderLinear(D, num_reflections=2).bind({"v": v})
    assert t.sign.tolist() == [1, -1, 1]
    assert ComposeFlow([t, permute(D), permute(D)]).sign.tolist() == [1, -1, 1]


# --- permutations ---


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))), ids=str)
def test_permute(permutation):
    t = Permute(permutation)
    x = torch.randn(2, 5, 3)
    y, ladj = t.forward_and_ladj(x)
    assert torch.equal(y, x[..., list(permutation)])
    assert torch.equal(ladj, torch.zeros(2, 5))
    assert torch.equal(t.inverse_and_ladj(y)[0], x)
    P = torch.eye(3)[list(permutation)]
    assert t.sign == torch.linalg.det(P)


def test_permute_kinds():
    assert permute(3).permutation.tolist() == [2, 1, 0]
    seeded = [
        permute(50, kind="random", generator=torch.Generator().manual_seed(1)).permutation
        for _ in range(2)
    ]
    assert torch.equal(*seeded)
    assert sorted(seeded[0].tolist()) == list(range(50))
    assert seeded[0].tolist() != list(range(50))


@pytest.mark.parametrize(
    "make", [lambda: permute(20, kind="random"), lambda: LULinear(20, permute=True)]
)
def test_state_dict_carries_the_permutation(make):
    a, b = make(), make()
    assert not torch.equal(a.permutation, b.permutation)
    b.load_state_dict(a.state_dict())
    x = torch.randn(20)
    assert torch.equal(a(x), b(x))
    assert a.sign == b.sign
    assert b.double().permutation.dtype == torch.long
