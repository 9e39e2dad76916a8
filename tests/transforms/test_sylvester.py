"""Sylvester flows: the three kinds of Q, the constraint at its limits, and the log-det where Pyro's is off."""

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    HouseholderSylvester,
    OrthogonalSylvester,
    TriangularSylvester,
    planar,
    sylvester,
)

KINDS = ["orthogonal", "householder", "triangular"]
kinds = pytest.mark.parametrize("kind", KINDS)


def check_at(transform, x, tolerance=1e-9):
    """Round trips both ways, the two log-dets, and finite gradients."""
    y, ladj = transform.forward_and_ladj(x)
    back, inverse_ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=100 * tolerance, atol=100 * tolerance)
    unseen, inverse_ladj = transform.inverse_and_ladj(x)
    torch.testing.assert_close(
        transform.forward_and_ladj(unseen)[0], x, rtol=tolerance, atol=tolerance
    )
    total = ladj.sum() + unseen.sum() + inverse_ladj.sum()
    grads = torch.autograd.grad(total, list(transform.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


# --- extremes ---


@kinds
@pytest.mark.parametrize("size", [5.0, 50.0])
@pytest.mark.parametrize("seed", range(4))
def test_saturated_diagonals(kind, size, seed):
    torch.manual_seed(seed)
    transform = perturb(sylvester(3, kind=kind, num_layers=2).double())
    with torch.no_grad():
        for diagonal in (transform.r.diagonal(dim1=-2, dim2=-1), transform.r_tilde_diag):
            diagonal.copy_(size * (2.0 * torch.randint(2, diagonal.shape) - 1))
    slope = 1 + transform._factors()[2]
    assert slope.min() >= 1e-3 * (1 - 1e-9)
    check_at(transform, torch.randn(20, 3, dtype=torch.float64), tolerance=1e-6)


@kinds
def test_large_raw_parameters(kind):
    transform = perturb(sylvester(3, kind=kind).double(), scale=20.0)
    check_at(transform, torch.randn(20, 3, dtype=torch.float64), tolerance=1e-5)


@kinds
def test_r_zero_is_the_identity(kind):
    transform, x = sylvester(3, kind=kind), torch.randn(5, 3)
    torch.nn.init.zeros_(transform.r)
    y, ladj = transform.forward_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(5))


@pytest.mark.parametrize("rows", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_zero_reflection_vectors(rows):
    transform = perturb(sylvester(4, kind="householder", num_reflections=3).double())
    with torch.no_grad():
        transform.v[:, rows] = 0.0
    check_at(transform, torch.randn(20, 4, dtype=torch.float64))


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(2))
def test_orthogonal_is_continuous_where_an_entry_of_q_changes_sign(row, column):
    transform = perturb(sylvester(3, rank=2).double())
    x = torch.randn(3, dtype=torch.float64)
    values = []
    with torch.no_grad():
        for entry in torch.linspace(-0.5, 0.5, 201):
            transform.q[0, row, column] = entry
            values.append(torch.cat([transform(x), transform.log_abs_det_jacobian(x, x)[None]]))
    path = torch.stack(values)
    steps = (path[1:] - path[:-1]).abs()
    assert steps.max() < 0.1
    assert steps.max() < 20 * steps.max(-1).values.median() + 1e-3


def by_one_context(dim, rank, direction):
    """A conditional flow whose network emits c `direction` for q, for a context c `(1)`, and nothing else."""
    flow = perturb(sylvester(dim, context_dim=1, hidden_dims=(), rank=rank).double(), scale=0.3)
    weight, bias = flow.hyper.net[0].weight, flow.hyper.net[0].bias
    position = 0
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
        for name, size in zip(flow.hyper.shapes, flow.hyper.sizes, strict=True):
            if name == "q":
                rows = slice(position, position + size)
                weight[rows, 0] = direction(flow.q).flatten()
            position += size
    return flow


@pytest.mark.parametrize("rank", [3, 2], ids=["square", "low-rank"])
def test_amortized_orthogonal_is_smooth_where_the_free_matrix_would_be_singular(rank):
    flow = by_one_context(3, rank, lambda q: -2 * q)  # q + c h = (1 - 2c) q is zero at c = 1/2
    context = torch.linspace(0, 1, 401, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    x = torch.randn(3, dtype=torch.float64)
    y, ladj = flow.condition(context).forward_and_ladj(x)
    (slope,) = torch.autograd.grad((y.sum(-1) + ladj).sum(), context, retain_graph=True)
    assert slope.isfinite().all()
    steps = (y[1:] - y[:-1]).detach().norm(dim=-1)
    assert steps.max() < 0.05
    gradients = torch.autograd.grad(ladj.sum(), list(flow.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def test_amortized_orthogonal_goes_on_across_a_change_of_the_determinants_sign():
    def towards(q):
        h = torch.zeros_like(q)
        h[..., -1] = -2 * q[..., -1]  # det(q + c h) = (1 - 2c) det q
        return h

    flow = by_one_context(4, 4, towards)
    context = torch.linspace(0, 1, 401, dtype=torch.float64).unsqueeze(-1)
    Q = flow.condition(context)._q().squeeze(1)
    assert torch.det(Q).sign().unique().numel() == 1
    assert (Q[1:] - Q[:-1]).norm(dim=(-2, -1)).max() < 0.05
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4).double().expand_as(Q))
    # It does depend on the context.
    assert (Q[-1] - Q[0]).norm() > 0.5


@kinds
def test_values_far_out_come_back(kind):
    transform = perturb(sylvester(3, kind=kind, num_layers=3).double())
    y = 1e6 * torch.randn(20, 3, dtype=torch.float64)
    x, ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(transform.forward_and_ladj(x)[0], y, rtol=1e-13, atol=1e-8)
    assert ladj.isfinite().all()


# --- what it starts as, how it stacks, what it contains ---


@kinds
@pytest.mark.parametrize("dim", [1, 3, 50])
def test_starts_near_the_identity(kind, dim):
    x = torch.randn(200, dim)
    y, ladj = sylvester(dim, kind=kind, num_layers=8).forward_and_ladj(x)
    assert (y - x).square().mean().sqrt() < 0.1
    assert ladj.abs().max() < 1.0


@kinds
@pytest.mark.parametrize("rank", [None, 2])
def test_stack_is_its_layers_one_by_one(kind, rank):
    stack = perturb(sylvester(3, kind=kind, rank=rank, num_layers=3).double())
    x = torch.randn(5, 3, dtype=torch.float64)
    value, total = x, torch.zeros(5, dtype=torch.float64)
    for i in range(3):
        options = {"flip": bool(i % 2)} if kind == "triangular" else {}
        layer = type(stack)(3, rank=rank, **options).double()
        layer.load_state_dict({name: p[i : i + 1] for name, p in stack.state_dict().items()})
        value, ladj = layer.forward_and_ladj(value)
        total = total + ladj
    torch.testing.assert_close(stack.forward_and_ladj(x), (value, total))
    torch.testing.assert_close(stack.inverse_and_ladj(value), (x, -total))


def test_formula_of_van_den_berg():
    transform = perturb(sylvester(4, kind="householder", rank=3).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    Q, r, a = transform._q()[0], transform.r[0], (1 - 1e-3) ** 0.5
    R = r.triu(1) + torch.diag(a * r.diagonal().tanh())
    R_tilde = r.mT.triu(1) + torch.diag(a * transform.r_tilde_diag[0].tanh())
    torch.testing.assert_close(Q.mT @ Q, torch.eye(3, dtype=torch.float64))
    expected = torch.stack(
        [row + Q @ R @ torch.tanh(R_tilde @ Q.mT @ row + transform.b[0]) for row in x]
    )
    torch.testing.assert_close(transform(x), expected)


def test_rank_one_is_planar():
    ours = perturb(sylvester(3, rank=1).double())
    with torch.no_grad():
        ours.r.copy_(ours.r.abs())
        ours.r_tilde_diag.copy_(ours.r_tilde_diag.abs())
    (A,), (Bt,), _ = ours._factors()
    theirs = planar(3).double()
    theirs.load_state_dict({"w": A, "u": Bt, "b": ours.b})
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(ours.forward_and_ladj(x), theirs.forward_and_ladj(x))
    torch.testing.assert_close(ours.inverse_and_ladj(x), theirs.inverse_and_ladj(x))


def test_triangular_alternates():
    Q = TriangularSylvester(3, num_layers=3)._q()
    flipped = TriangularSylvester(3, num_layers=3, flip=True)._q()
    eye = torch.eye(3)
    assert torch.equal(Q, torch.stack([eye, eye.flip(0), eye]))
    assert torch.equal(flipped, torch.stack([eye.flip(0), eye, eye.flip(0)]))


@kinds
@pytest.mark.parametrize("rank", [2, 3], ids=["low-rank", "square"])
def test_every_parameter_counts(kind, rank):
    options = {"num_reflections": 3} if kind == "householder" else {}
    transform = perturb(sylvester(3, kind=kind, rank=rank, **options).double())
    y, ladj = transform.forward_and_ladj(torch.randn(5, 3, dtype=torch.float64))
    names, parameters = zip(*transform.named_parameters(), strict=True)
    grads = torch.autograd.grad(y.square().sum() + ladj.sum(), parameters)
    sizes = {name: grad.abs() for name, grad in zip(names, grads, strict=True)}
    if kind == "orthogonal" and rank == 3:
        # The others determine the last column of a square Q up to its sign: its gradient is rounding noise.
        sizes["q"], last = sizes["q"].split([2, 1], dim=-1)
        assert last.max() < 1e-10
    # A gradient is this small by chance once in 10^7 draws; of a parameter that does not count it is zero.
    assert all(size.min() > 1e-9 for size in sizes.values())


# --- against Pyro ---


def true_ladj(transform, x):
    rows = [torch.autograd.functional.jacobian(transform, row) for row in x]
    return torch.linalg.slogdet(torch.stack(rows))[1]


@pytest.mark.parametrize("seed", range(4))
def test_log_det_is_right_where_that_of_pyro_is_off(seed):
    torch.manual_seed(seed)
    # Its Q(x) makes an identity in the default dtype, so float32 it is.
    theirs = perturb(dist.transforms.Sylvester(3, count_transforms=2))
    ours = perturb(sylvester(3, kind="householder", num_reflections=2))
    x = torch.randn(20, 3)

    def error(transform):
        y = transform(x)
        return (transform.log_abs_det_jacobian(x, y) - true_ladj(transform, x)).abs().max().item()

    assert error(ours) < 1e-4
    assert error(theirs) > 1e-2


# --- errors and forms ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sylvester(0), "input_dim: expected a positive integer, got 0"),
        (lambda: sylvester(3, rank=4), "rank: expected at most input_dim = 3, got 4"),
        (lambda: sylvester(3, rank=0), "rank: expected a positive integer, got 0"),
        (
            lambda: sylvester(3, kind="diagonal"),
            "kind: expected one of orthogonal, householder, triangular; got 'diagonal'",
        ),
        (
            lambda: sylvester(3, num_reflections=2),
            "num_reflections: expected None unless kind=\"householder\", got kind='orthogonal'",
        ),
        (
            lambda: sylvester(3, kind="householder", num_reflections=0),
            "num_reflections: expected a positive integer, got 0",
        ),
        (
            lambda: sylvester(3, kind="triangular", num_reflections=2, context_dim=2),
            "num_reflections: expected None unless kind=\"householder\", got kind='triangular'",
        ),
        (
            lambda: sylvester(3)(torch.zeros(5, 2)),
            r"x: expected a tensor of shape \(\*, 3\), got \(5, 2\)",
        ),
    ],
    ids=["dim", "rank-high", "rank-low", "kind", "option", "reflections", "conditional", "shape"],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("orthogonal", OrthogonalSylvester),
        ("householder", HouseholderSylvester),
        ("triangular", TriangularSylvester),
    ],
    ids=KINDS,
)
def test_kinds(kind, expected):
    made = sylvester(4, kind=kind, rank=2, num_layers=3, context_dim=2)
    assert type(made) is expected
    assert made.context_dim == 2
    assert repr(made).startswith(f"{expected.__name__}(4, rank=2, num_layers=3")


@pytest.mark.parametrize(("dim", "expected"), [(3, 3), (8, 8), (64, 8)])
def test_number_of_reflections(dim, expected):
    assert sylvester(dim, kind="householder").v.shape == (1, expected, dim)
    assert sylvester(dim, kind="householder", num_reflections=5).v.shape == (1, 5, dim)
