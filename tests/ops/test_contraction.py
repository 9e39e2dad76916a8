"""Inverses of x + g(x): right for every contraction, never slower than plain steps, with derivatives."""

import pytest
import torch

import pyro_flows_ext.ops.contraction as contraction
from pyro_flows_ext.ops import anderson, contraction_inverse

METHODS = ["newton", "anderson"]


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    """Both methods at any dimension."""
    monkeypatch.setattr(contraction, "NEWTON_DIM", 10**6 if request.param == "newton" else 0)
    return request.param


class Ridge:
    """g(x) = c A h(Aᵀ x + b) for orthonormal columns A: slopes of -c where h is steep, which is where plain steps crawl."""

    def __init__(self, dim, units, lipschitz=0.97, sign=-1, sharpness=1.0):
        self.A = torch.linalg.qr(torch.randn(max(dim, units), min(dim, units)).double()).Q
        self.A = self.A if units <= dim else self.A.T
        self.b = torch.randn(units, dtype=torch.float64)
        self.c, self.sharpness = sign * lipschitz, sharpness
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        h = torch.tanh(self.sharpness * (x @ self.A + self.b)) / self.sharpness
        return self.c * h @ self.A.T

    def linearize(self, x):
        h = torch.tanh(self.sharpness * (x @ self.A + self.b))

        def product(V):
            return self.c * ((1 - h**2) * (V @ self.A)) @ self.A.T

        return self(x), product


def residual(g, x, y):
    return (x + g(x) - y).norm(dim=-1)


CASES = [
    pytest.param(dim, units, sign, sharpness, id=f"{dim}-{units}-{sign:+d}-{sharpness:g}")
    for dim, units in ((1, 1), (2, 1), (5, 5), (5, 20), (20, 20))
    for sign in (-1, 1)
    for sharpness in (1.0, 30.0)
]


@pytest.mark.parametrize(("dim", "units", "sign", "sharpness"), CASES)
def test_solves_the_equation(method, dim, units, sign, sharpness):
    g = Ridge(dim, units, sign=sign, sharpness=sharpness)
    for scale in (0.0, 0.1, 3.0, 100.0):
        y = scale * torch.randn(50, dim, dtype=torch.float64)
        assert (
            residual(g, contraction_inverse(g, y, 0.97), y) < 1e-13 * (1 + y.norm(dim=-1))
        ).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_to_rounding_in_either_dtype(method, dtype):
    g = Ridge(4, 4)
    g.A, g.b = g.A.to(dtype), g.b.to(dtype)
    x = torch.randn(30, 4, dtype=dtype)
    y = x + g(x)
    found = contraction_inverse(g, y, 0.97)
    assert found.dtype == dtype
    assert (found - x).abs().max() < 1000 * torch.finfo(dtype).eps


def plain_steps(g, y):
    x = y
    for n in range(1, 5000):
        r = x + g(x) - y
        if (r.norm(dim=-1) <= 16 * torch.finfo(y.dtype).eps * (1 + x.norm(dim=-1))).all():
            return n
        x = x - r
    return n


@pytest.mark.parametrize(("dim", "units"), [(20, 20), (20, 5)])
def test_acceleration(dim, units):
    g = Ridge(dim, units)
    y = torch.randn(50, dim, dtype=torch.float64)
    slow = plain_steps(g, y)
    g.calls = 0
    anderson(g, y, 0.97)
    assert slow > 300
    assert g.calls < slow / 3


def test_fixed_steps_are_enough():
    """What a compiled program takes, which cannot look, is as good on the hardest slopes."""
    for seed in range(10):
        torch.manual_seed(seed)
        g = Ridge(2, 1 + seed % 2, sharpness=1.0 + seed)
        y = 3 * torch.randn(50, 2, dtype=torch.float64)
        x = torch.func.vmap(lambda y, g=g: contraction_inverse(g, y, 0.97))(y)
        assert residual(g, x, y).max() < 1e-12


def test_a_step_that_misleads_is_taken_back():
    """Newton's method alone goes round in circles here: the slope falls from 1 to 0.03 within a hundredth."""
    g = Ridge(1, 1, sharpness=100.0)
    g.A, g.b = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    y = torch.linspace(-0.1, 0.1, 101, dtype=torch.float64)[:, None]
    x = contraction_inverse(g, y, 0.97)
    assert residual(g, x, y).max() < 1e-15


def test_rows_are_on_their_own(method):
    g = Ridge(4, 3)
    y = torch.randn(5, 4, dtype=torch.float64)
    y[1], y[2], y[3] = torch.nan, 1e9 * y[2], torch.inf
    x = contraction_inverse(g, y, 0.97)
    assert not x[1].isfinite().any()
    for i in (0, 2, 4):
        alone = contraction_inverse(g, y[i], 0.97)
        torch.testing.assert_close(x[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_gradients_are_the_implicit_ones(method, batch):
    g = Ridge(4, 3)
    leaves = [t.requires_grad_() for t in (g.A.detach(), g.b)]
    g.A = leaves[0]
    y = torch.randn(*batch, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(*batch, 4, dtype=torch.float64)
    x = contraction_inverse(g, y, 0.97)
    actual = torch.autograd.grad((v * x).sum(), [y, *leaves])

    root = x.detach()
    jacobian = torch.func.jacrev(g)
    for _ in batch:
        jacobian = torch.func.vmap(jacobian)
    w = torch.linalg.solve(torch.eye(4) + jacobian(root).mT, v).detach()
    expected = torch.autograd.grad((w * (y - g(root))).sum(), [y, *leaves])
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_tiny_gradients_keep_their_digits(method):
    g = Ridge(4, 3)
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x = contraction_inverse(g, y, 0.97)
    v = torch.randn(3, 4, dtype=torch.float64)
    large, small = (
        torch.autograd.grad((s * v * x).sum(), y, retain_graph=True)[0] for s in (1.0, 1e-30)
    )
    torch.testing.assert_close(small * 1e30, large, rtol=1e-12, atol=1e-12)


def test_second_derivatives(method):
    g = Ridge(3, 3)
    y = torch.randn(3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda y: contraction_inverse(g, y, 0.97))
    hessian = torch.func.jacrev(jacobian)(y)
    h = 1e-5
    for i, e in enumerate(torch.eye(3, dtype=torch.float64)):
        difference = (jacobian(y + h * e) - jacobian(y - h * e)) / (2 * h)
        torch.testing.assert_close(hessian[..., i], difference, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own formulas
def test_forward_mode(method):
    g = Ridge(3, 3)
    y = torch.randn(3, dtype=torch.float64)
    inverse = lambda y: contraction_inverse(g, y, 0.97)  # noqa: E731
    torch.testing.assert_close(torch.func.jacfwd(inverse)(y), torch.func.jacrev(inverse)(y))


def test_large_events_say_that_they_have_no_second_derivative():
    g = Ridge(20, 3)
    y = torch.randn(20, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="take second derivatives with"):
        torch.autograd.grad(contraction_inverse(g, y, 0.97).sum(), y, create_graph=True)


def test_large_events_keep_one_graph():
    sizes = set()
    for scale in (1e-3, 0.5, 0.97):
        g, saved = Ridge(20, 20, lipschitz=scale), []
        g.A.requires_grad_()
        y = torch.randn(5, 20, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            contraction_inverse(g, y, 0.97)
        sizes.add(sum(saved))
    assert len(sizes) == 1


def test_no_contraction_is_an_error(method, monkeypatch):
    """x + g(x) = sin x, which is never 2."""
    g = Ridge(1, 1)
    g.linearize = lambda x: (x.sin() - x, lambda V: (x.cos() - 1) * V)
    monkeypatch.setattr(Ridge, "__call__", lambda self, x: self.linearize(x)[0])
    y = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"expected a g of Lipschitz constant 0.9 at most"):
        contraction_inverse(g, y, 0.9)
