"""Orthonormal bases from unconstrained tensors: orthonormal, smooth, and the product that they say they are."""

import pytest
import torch

from pyro_flows_ext.ops import (
    householder_columns,
    matvec,
    orthonormal_columns,
    turned_columns,
)
from pyro_flows_ext.ops.linalg import solve_triangular

BROADCASTS = [
    ((), ()),
    ((), (5,)),
    ((5,), (5,)),
    ((5,), ()),
    ((2, 1), (5,)),
    ((), (2, 5)),
    ((5,), (4, 5)),
    ((5,), (2, 1, 5)),
    ((1, 5), (2, 4, 1)),
    ((5,), (0, 5)),
]
BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)


def is_orthonormal(Q, tolerance=1e-13):
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return (Q.mT @ Q - eye).abs().max() < tolerance


@pytest.mark.parametrize(
    ("A_batch", "x_batch"),
    BROADCASTS,
    ids=str,
)
def test_matvec_broadcasts(A_batch, x_batch):
    A, x = torch.randn(*A_batch, 2, 3), torch.randn(*x_batch, 3)
    expected = (A.unsqueeze(-3) @ x[..., None, :, None]).squeeze((-3, -1))
    torch.testing.assert_close(matvec(A, x), expected)


@pytest.mark.parametrize(("A_batch", "b_batch"), BROADCASTS, ids=str)
@pytest.mark.parametrize("upper", [False, True])
def test_solve_triangular_broadcasts(A_batch, b_batch, upper):
    A = torch.randn(*A_batch, 3, 3).double() + 3 * torch.eye(3)
    b = torch.randn(*b_batch, 3).double()
    x = solve_triangular(A, b, upper=upper)
    assert x.shape == (*torch.broadcast_shapes(A_batch, b_batch), 3)
    product = matvec(A.triu() if upper else A.tril(), x)
    torch.testing.assert_close(product, b.expand(x.shape))


@BATCHES
@pytest.mark.parametrize(("D", "M"), [(4, 4), (4, 2), (1, 1)])
def test_orthonormal_columns(batch, D, M):
    A = torch.randn(*batch, D, M, dtype=torch.float64)
    Q = orthonormal_columns(A)
    assert Q.shape == A.shape
    assert is_orthonormal(Q)
    R = Q.mT @ A
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(R, R.triu(), rtol=0, atol=1e-13)
    torch.testing.assert_close(Q @ R, A)


def test_orthonormal_columns_of_an_orthonormal_matrix_is_itself():
    Q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    torch.testing.assert_close(orthonormal_columns(Q), Q)


@pytest.mark.parametrize("entry", [(i, j) for i in range(3) for j in range(2)], ids=str)
def test_orthonormal_columns_is_continuous_where_an_entry_changes_sign(entry):
    # No two rows are parallel: whichever entry moves, the columns stay apart.
    A = torch.tensor([[1.0, -0.5], [0.7, 1.2], [-0.4, 0.9]], dtype=torch.float64).repeat(401, 1, 1)
    A[:, entry[0], entry[1]] = torch.linspace(-1, 1, 401)
    Q = orthonormal_columns(A)
    # A flipped column would jump by up to 2; the path itself moves by its speed times 1 / 200.
    assert (Q[1:] - Q[:-1]).abs().max() < 0.1


def test_orthonormal_columns_gradient():
    A = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(orthonormal_columns, A)


def reflections(V):
    """H_1 ... H_K, one product after the other; a vector of zeros reflects nothing."""
    Q = torch.eye(V.shape[-1], dtype=V.dtype)
    for v in V:
        if v.any():
            v = v / v.abs().max()
            Q = Q @ (torch.eye(len(v), dtype=V.dtype) - 2 * torch.outer(v, v) / (v @ v))
    return Q


@pytest.mark.parametrize(("K", "D"), [(1, 3), (3, 3), (5, 3), (2, 1), (8, 5)])
def test_householder_columns_is_the_product_of_reflections(K, D):
    V = torch.randn(K, D, dtype=torch.float64)
    torch.testing.assert_close(householder_columns(V), reflections(V))
    for M in range(1, D + 1):
        torch.testing.assert_close(householder_columns(V, M), reflections(V)[:, :M])


@BATCHES
def test_householder_columns_batched(batch):
    V = torch.randn(*batch, 3, 4, dtype=torch.float64)
    Q = householder_columns(V, 2)
    assert Q.shape == (*batch, 4, 2)
    assert is_orthonormal(Q)
    last = (0,) * len(batch)
    torch.testing.assert_close(Q[last], reflections(V[last])[:, :2])


@pytest.mark.parametrize(
    "row",
    [[0.0] * 4, [1e-200] * 4, [1e150] * 4, [0.0, 0.0, 1.0, 0.0]],
    ids=["zero", "tiny", "huge", "axis"],
)
def test_householder_columns_of_any_vector_is_orthonormal(row):
    V = torch.randn(3, 4, dtype=torch.float64)
    V[1] = torch.tensor(row, dtype=torch.float64)
    V.requires_grad_()
    Q = householder_columns(V)
    assert is_orthonormal(Q.detach())
    (grad,) = torch.autograd.grad((Q * torch.randn(4, 4)).sum(), V)
    assert grad.isfinite().all()


def test_householder_columns_of_repeated_vectors_cancel():
    v = torch.randn(1, 4, dtype=torch.float64)
    Q = householder_columns(torch.cat([v, 3 * v]))
    torch.testing.assert_close(Q, torch.eye(4, dtype=torch.float64))


def test_a_zero_vector_reflects_nothing():
    V = torch.randn(2, 4, dtype=torch.float64)
    with_zero = torch.stack([V[0], torch.zeros(4), V[1]])
    torch.testing.assert_close(householder_columns(with_zero), householder_columns(V))


def test_householder_columns_gradient():
    V = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda V: householder_columns(V, 2), V)


@BATCHES
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 2)], ids=str)
@pytest.mark.parametrize("size", [0.1, 1.0, 1e4])
def test_turned_columns_are_orthonormal(batch, shape, size):
    Q = orthonormal_columns(torch.randn(*shape, dtype=torch.float64))
    V = size * torch.randn(*batch, *shape, dtype=torch.float64)
    V.requires_grad_()
    turned = turned_columns(Q, V)
    assert is_orthonormal(turned, 1e-10)
    (gradient,) = torch.autograd.grad((turned * torch.randn_like(turned)).sum(), V)
    assert gradient.isfinite().all()


def test_turned_columns_by_the_definition():
    Q = orthonormal_columns(torch.randn(4, 2, dtype=torch.float64))
    V = torch.randn(4, 2, dtype=torch.float64)
    A, eye = V @ Q.mT - Q @ V.mT, torch.eye(4, dtype=torch.float64)
    expected = torch.linalg.inv(eye - A / 2) @ (eye + A / 2) @ Q
    torch.testing.assert_close(turned_columns(Q, V), expected)
    torch.testing.assert_close(turned_columns(Q, 0 * V), Q)
    step = turned_columns(Q, 1e-6 * V) - Q
    torch.testing.assert_close(1e6 * step, V - Q @ V.mT @ Q, atol=1e-5, rtol=1e-5)
