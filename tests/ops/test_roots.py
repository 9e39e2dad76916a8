"""Roots of monotone functions: exact over the whole range of parameters, and with exact derivatives."""

import pytest
import torch

from pyro_flows_ext.ops import monotone_root, tanh_root, triangular_tanh_root

DTYPES = [torch.float64, torch.float32]
EPS = {torch.float64: 1e-15, torch.float32: 1e-6}


def grid(dtype):
    """k from just above -1 to 1e6, q from 0 to 1e8 on both sides: all of the range of a planar layer."""
    below = -1 + torch.logspace(-3, 0, 60, dtype=torch.float64)
    k = torch.cat([below, torch.zeros(1), torch.logspace(-6, 6, 60, dtype=torch.float64)])
    q = torch.logspace(-12, 8, 90, dtype=torch.float64)
    q = torch.cat([-q, torch.zeros(1), q])
    return torch.meshgrid(k.to(dtype), q.to(dtype), indexing="ij")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "vmap"])
def test_tanh_root_solves_its_equation(dtype, eager):
    k, q = grid(dtype)
    p = tanh_root(k, q) if eager else torch.vmap(tanh_root)(k, q)
    assert p.dtype == dtype
    residual = p.double() + k.double() * p.double().tanh() - q.double()
    assert (residual.abs() / (1 + q.double().abs())).max() < EPS[dtype]


def test_tanh_root_with_fixed_steps_is_the_eager_one():
    k, q = grid(torch.float64)
    torch.testing.assert_close(torch.vmap(tanh_root)(k, q), tanh_root(k, q), rtol=1e-11, atol=0)


def test_tanh_root_is_odd_and_zero_at_zero():
    k, q = grid(torch.float64)
    assert torch.equal(tanh_root(k, -q), -tanh_root(k, q))
    assert torch.equal(tanh_root(k[:, 0], torch.zeros_like(k[:, 0])), torch.zeros_like(k[:, 0]))


def test_tanh_root_solves_beyond_the_fixed_steps_in_eager_mode():
    k = torch.tensor(1e9, dtype=torch.float64)
    q = torch.linspace(0, 2e9, 1001, dtype=torch.float64)
    p = tanh_root(k, q)
    assert ((p + k * p.tanh() - q).abs() / (1 + q)).max() < 1e-15


def test_tanh_root_keeps_nan_to_its_row():
    q = torch.tensor([1.0, torch.nan, -2.0])
    p = tanh_root(torch.tensor(0.5), q)
    assert p[1].isnan()
    assert torch.equal(p[::2], tanh_root(torch.tensor(0.5), q[::2]))


@pytest.mark.parametrize("k", [-0.999, -0.5, 0.0, 0.7, 50.0])
@pytest.mark.parametrize("q", [-3.0, 0.0, 0.4, 40.0])
def test_tanh_root_derivatives(k, q):
    k, q = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (k, q))
    torch.autograd.gradcheck(tanh_root, (k, q), eps=1e-7, atol=1e-4, rtol=1e-3)
    # With s = 1 / (1 + k sech² p): dp/dq = s and dp/dk = -s tanh p.
    p = tanh_root(k, q)
    slope = 1 / (1 + k * (1 - p.tanh() ** 2))
    dk, dq = torch.autograd.grad(p, (k, q), create_graph=True)
    torch.testing.assert_close(dq, slope, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dk, -slope * p.tanh(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [-0.9, 0.0, 3.0])
@pytest.mark.parametrize("q", [-2.0, 0.3, 5.0])
def test_tanh_root_has_three_exact_derivatives(k, q):
    k, q = torch.tensor(k, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    order, by_root = lambda v: tanh_root(k, v), []
    for _ in range(3):
        order = torch.func.grad(order)
        by_root.append(order(q))

    # p' = s(p) with s = 1 / (1 + k sech² p), hence p'' = s' s and p''' = (s' s)' s.
    def s(p):
        return 1 / (1 + k * (1 - p.tanh() ** 2))

    def second(p):
        return torch.func.grad(s)(p) * s(p)

    p = tanh_root(k, q)
    expected = [s(p), second(p), torch.func.grad(second)(p) * s(p)]
    torch.testing.assert_close(by_root, expected, rtol=1e-9, atol=1e-12)


def cubic(c):
    return lambda x: (x**3 + x - c, 3 * x**2 + 1)


def softplus(c):
    return lambda x: (torch.nn.functional.softplus(x) - c, x.sigmoid())


def steep(c):
    return lambda x: ((50 * x).tanh() + 1e-3 * x - c, 50 / (50 * x).cosh() ** 2 + 1e-3)


@pytest.mark.parametrize(
    ("function", "values", "bracket"),
    [
        (cubic, torch.linspace(-1000, 1000, 41, dtype=torch.float64), 1000.0),
        (softplus, torch.logspace(-8, 2, 41, dtype=torch.float64), 200.0),
        (steep, torch.linspace(-1.05, 1.05, 41, dtype=torch.float64), 100.0),
    ],
    ids=["cubic", "softplus", "steep"],
)
@pytest.mark.parametrize("start", [None, -1.0, 1.0], ids=["middle", "lower", "upper"])
def test_monotone_root_converges_from_any_start(function, values, bracket, start):
    lower, upper = torch.full_like(values, -bracket), torch.full_like(values, bracket)
    first = None if start is None else torch.full_like(values, start * bracket)
    root = monotone_root(function(values), lower, upper, start=first)
    value, slope = function(values)(root)
    assert ((root >= lower) & (root <= upper)).all()
    # Either the residual or the step to the exact root is at rounding level.
    assert (torch.minimum(value.abs(), (value / slope).abs()) < 1e-12 * (1 + values.abs())).all()


def test_monotone_root_at_the_end_of_its_bracket():
    c = torch.tensor([0.0, 2.0], dtype=torch.float64)
    root = monotone_root(cubic(c), torch.zeros_like(c), torch.ones_like(c))
    torch.testing.assert_close(root, c / 2)


def test_monotone_root_under_vmap():
    c = torch.linspace(-100, 100, 21, dtype=torch.float64)
    bound = torch.tensor(100.0, dtype=torch.float64)
    batched = torch.vmap(lambda c: monotone_root(cubic(c), -bound, bound))(c)
    torch.testing.assert_close(batched**3 + batched, c, rtol=1e-12, atol=1e-12)


def test_monotone_root_gradient():
    c = torch.linspace(-5, 5, 7, dtype=torch.float64, requires_grad=True)
    bound = torch.full_like(c, 10)
    root = monotone_root(cubic(c), -bound, bound)
    (grad,) = torch.autograd.grad(root.sum(), c)
    torch.testing.assert_close(grad, 1 / (3 * root.detach() ** 2 + 1), rtol=1e-12, atol=0)


def triangular(batch, M, dtype=torch.float64):
    K = torch.randn(*batch, M, M, dtype=dtype).triu(1)
    return K + torch.diag_embed(3 * torch.rand(*batch, M, dtype=dtype) - 0.999)


@pytest.mark.parametrize("M", [1, 2, 5])
@pytest.mark.parametrize(
    ("K_batch", "q_batch"),
    [((), ()), ((), (4,)), ((4,), (4,)), ((4,), ()), ((3, 1), (4,))],
    ids=["plain", "rows", "both", "matrices", "outer"],
)
def test_triangular_tanh_root_solves_its_equation(M, K_batch, q_batch):
    K, q = triangular(K_batch, M), 5 * torch.randn(*q_batch, M, dtype=torch.float64)
    p = triangular_tanh_root(K, q)
    assert p.shape == (*torch.broadcast_shapes(K_batch, q_batch), M)
    residual = p + (K @ p.tanh().unsqueeze(-1)).squeeze(-1) - q
    assert residual.abs().max() < 1e-13


def test_triangular_tanh_root_of_one_unit_is_the_scalar_root():
    K, q = triangular((6,), 1), torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(triangular_tanh_root(K, q), tanh_root(K[..., 0], q))


def test_triangular_tanh_root_gradient():
    K = triangular((2,), 3).requires_grad_()
    q = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda K, q: triangular_tanh_root(K.triu(), q), (K, q))


@pytest.mark.parametrize("root", [tanh_root, triangular_tanh_root], ids=["scalar", "triangular"])
def test_roots_on_the_meta_device(root):
    K = torch.empty(3, 3, device="meta")
    q = torch.empty(5, 3, device="meta") if root is triangular_tanh_root else K
    p = root(K, q)
    assert p.device.type == "meta"
    assert p.shape == q.shape
