"""Fixed points of strictly triangular maps: exact in D sweeps or fewer, exact derivatives, one step's memory."""

import pytest
import torch
from torch.autograd import forward_ad

from pyro_flows_ext.ops import triangular_fixed_point

D = 6
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])


# What torch's own forward-mode formulas warn of when they are first loaded.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def strictly_triangular(scale=1.0):
    """A `(D, D)` matrix that is strictly lower triangular in `ORDER`."""
    A = torch.zeros(D, D, dtype=torch.float64)
    A[ORDER.unsqueeze(-1), ORDER] = scale * torch.randn(D, D, dtype=torch.float64).tril(-1)
    return A


def sine_step(A, c):
    """x <- c + A sin x, with aux = a sum over cos x of all but the last variable."""

    def step(x):
        rest = x.index_select(-1, ORDER[:-1])
        return c + torch.sin(x) @ A.mT, (c.sum(-1, keepdim=True) * rest.cos()).sum(-1)

    return step


def one_by_one(A, c):
    """The same fixed point by substitution, in view of autograd."""
    x = [torch.zeros(c.shape[:-1], dtype=c.dtype)] * D
    for i in ORDER.tolist():
        x[i] = (c + torch.sin(torch.stack(x, -1)) @ A.mT)[..., i]
    x = torch.stack(x, -1)
    return x, sine_step(A, c)(x)[1]


def sine_fixed_point(A, c):
    return triangular_fixed_point(sine_step(A, c), torch.zeros(D, dtype=c.dtype), D)


def counted(step):
    calls = []

    def run(x):
        calls.append(x)
        return step(x)

    return run, calls


def problem(*batch, scale=1.0):
    return strictly_triangular(scale), torch.randn(*batch, D, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_is_the_solution_by_substitution(batch, scale):
    A, c = problem(*batch, scale=scale)
    torch.testing.assert_close(sine_fixed_point(A, c), one_by_one(A, c), rtol=1e-11, atol=1e-11)


def test_any_start_and_a_linear_map():
    A, c = problem(4)
    x, aux = triangular_fixed_point(lambda x: (c + x @ A.mT, x.new_ones(())), 100 * c + 7, D)
    eye = torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(x, torch.linalg.solve(eye - A, c.mT).mT)
    assert aux == 1


@pytest.mark.parametrize(
    ("scale", "most"), [(0.0, 2), (1e-6, 4), (0.01, D), (1.0, D)], ids=["0", "1e-6", "0.01", "1"]
)
def test_sweeps_end_when_nothing_changes(scale, most):
    A, c = problem(50, scale=scale)
    step, calls = counted(sine_step(A, c))
    triangular_fixed_point(step, torch.zeros(D, dtype=torch.float64), D)
    assert 2 <= len(calls) <= most


def test_k_variables_are_exact_after_k_sweeps():
    A, c = problem(50, scale=5.0)
    exact = one_by_one(A, c)[0]
    for k in range(1, D + 1):
        x, _ = triangular_fixed_point(sine_step(A, c), torch.full_like(c, 9.0), k)
        known = ORDER[:k]
        torch.testing.assert_close(x[:, known], exact[:, known], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("batch", [(), (4,)], ids=str)
@pytest.mark.parametrize("which", ["x", "aux", "both"])
def test_gradients_are_those_of_substitution(batch, which):
    A, c = problem(*batch, scale=2.0)
    weight, weight_aux = torch.randn_like(c), torch.randn(batch, dtype=torch.float64)
    grads = []
    for solve in (sine_fixed_point, one_by_one):
        leaves = A.clone().requires_grad_(), c.clone().requires_grad_()
        x, aux = solve(*leaves)
        loss = (weight * x).sum() * (which != "aux") + (weight_aux * aux).sum() * (which != "x")
        grads.append(torch.autograd.grad(loss, leaves))
    # Substitution sees no entry of A outside the triangle; the step multiplies them all.
    known = strictly_triangular() != 0
    torch.testing.assert_close(grads[0][0][known], grads[1][0][known], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-10, atol=1e-10)


def test_gradcheck():
    A, c = problem(3)
    known = (A != 0).to(A.dtype)
    torch.autograd.gradcheck(
        lambda A, c: sine_fixed_point(A * known, c), (A.requires_grad_(), c.requires_grad_())
    )


def test_aux_without_a_gradient():
    A, c = problem(3)
    c.requires_grad_()
    x, aux = triangular_fixed_point(
        lambda x: (c + torch.sin(x) @ A.mT, torch.zeros(3, dtype=x.dtype)), c.detach(), D
    )
    (grad,) = torch.autograd.grad((x + aux.unsqueeze(-1)).sum(), c)
    expected = torch.autograd.grad(one_by_one(A, c)[0].sum(), c)[0]
    torch.testing.assert_close(grad, expected)


def test_rows_with_gradients_of_all_sizes():
    """A row that weighs 1e-20 is solved as well as its neighbours."""
    A, c = problem(3, scale=2.0)
    weight = torch.tensor([[1e-20], [1.0], [1e20]], dtype=torch.float64)
    c.requires_grad_()
    (grad,) = torch.autograd.grad((weight * sine_fixed_point(A, c)[0]).sum(), c)
    (expected,) = torch.autograd.grad(one_by_one(A, c)[0].sum(), c)
    torch.testing.assert_close(grad / weight, expected, rtol=1e-12, atol=1e-13)


def saved_tensors(run):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = run()
    return len(saved), result


def test_memory_does_not_grow_with_the_sweeps():
    counts = {}
    for scale in (0.0, 1.0, 30.0):
        A, c = problem(50, scale=scale)
        step, calls = counted(sine_step(A, c.requires_grad_()))
        # All results are held, as in a graph that is still to be used.
        first = saved_tensors(lambda step=step: step(torch.zeros(D, dtype=torch.float64)))
        number, result = saved_tensors(
            lambda step=step: triangular_fixed_point(step, torch.zeros(D, dtype=torch.float64), D)
        )
        assert result[0].requires_grad
        counts[len(calls)] = number - first[0]
    assert len(counts) > 1, "all took the same number of sweeps"
    assert len(set(counts.values())) == 1


def test_no_graph_where_nothing_needs_one():
    A, c = problem(3)
    x, aux = sine_fixed_point(A, c)
    assert [x.requires_grad, aux.requires_grad] == [False, False]
    with torch.no_grad():
        x, aux = sine_fixed_point(A, c.requires_grad_())
    assert [x.requires_grad, aux.requires_grad] == [False, False]


@forward_mode
def test_second_derivatives_raise_in_eager_mode_and_exist_under_func():
    A, c = problem()
    c.requires_grad_()
    x, _ = sine_fixed_point(A, c)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(x.sum(), c, create_graph=True)
    hessians = [
        torch.func.hessian(lambda c, solve=solve: sum(t.sum() for t in solve(A, c)))(c.detach())
        for solve in (sine_fixed_point, one_by_one)
    ]
    torch.testing.assert_close(*hessians, rtol=1e-10, atol=1e-10)


@forward_mode
def test_function_transforms():
    A, c = problem(4)
    expected = torch.stack([torch.func.jacrev(lambda v: one_by_one(A, v)[0])(v) for v in c])
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = torch.func.vmap(jacobian(lambda v: sine_fixed_point(A, v)[0]))(c)
        torch.testing.assert_close(found, expected)


@forward_mode
def test_forward_mode():
    A, c = problem(4, scale=1e-3)
    v = torch.randn_like(c)
    expected = torch.func.jvp(lambda c: one_by_one(A, c), (c,), (v,))[1]
    with forward_ad.dual_level():
        x, aux = sine_fixed_point(A, forward_ad.make_dual(c, v))
        found = forward_ad.unpack_dual(x).tangent, forward_ad.unpack_dual(aux).tangent
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_rows_do_not_leak_into_each_other():
    """Rows that settle at once, late or never: each is what it is alone, value and gradient."""
    A, c = problem(5, scale=3.0)
    c[1], c[3] = 1e-9 * c[1], torch.nan
    c[4, ORDER[0]] = torch.inf
    c.requires_grad_()
    x, _ = sine_fixed_point(A, c)
    (grad,) = torch.autograd.grad(x[:3].sum(), c)
    assert x[3].isnan().all()
    assert not x[4].isfinite().all()
    for i in range(3):
        row = c[i].detach().requires_grad_()
        alone, _ = sine_fixed_point(A, row)
        torch.testing.assert_close(x[i], alone, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(grad[i], torch.autograd.grad(alone.sum(), row)[0])


def test_a_row_that_is_not_finite_holds_up_no_other():
    A, c = problem(3, scale=1e-9)
    c[1] = torch.nan
    step, calls = counted(sine_step(A, c))
    triangular_fixed_point(step, torch.zeros(D, dtype=torch.float64), D)
    assert len(calls) < D


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "vmap"])
def test_sweeps_may_overflow_on_their_way(eager):
    """x_i = relu(10³⁰ x_{i-1} - 1) of x_0 = -1 is 0, but from a start at 1 the sweeps reach infinity first."""

    W = 1e30 * torch.eye(20, dtype=torch.float32).roll(1, 0).tril(-1)
    first = torch.zeros(20)
    first[0] = 1

    def solve(c):
        def step(x):
            y = torch.relu(torch.nn.functional.linear(x, W) - 1) * (1 - first) + c * first
            return y, y.new_zeros(())

        return triangular_fixed_point(step, torch.ones(20), 20)[0]

    c = torch.tensor([[-1.0], [-2.0]])
    x = solve(c) if eager else torch.func.vmap(solve)(c)
    torch.testing.assert_close(x, c * first)
