"""Rational-quadratic splines: the map, its inverse and its slopes, at knots, in tails and under stress."""

import math

import pytest
import torch

from pyro_flows_ext.ops import rq_spline
from pyro_flows_ext.ops.rational_quadratic import MIN_BIN, MIN_SLOPE

BOUND = 3.0
DIRECTIONS = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
BINS = pytest.mark.parametrize("K", [1, 2, 8, 20], ids=lambda K: f"{K}-bins")


def draw(K=8, n=400, scale=1.0, dtype=torch.float64, width=1.5 * BOUND):
    """Points from tail to tail, and parameters of their own for each."""
    x = torch.linspace(-width, width, n, dtype=torch.float64).to(dtype)
    return x, (scale * torch.randn(n, 3 * K - 1, dtype=torch.float64)).to(dtype)


def knots(raw, bound=BOUND):
    """Knots and slopes of one spline by the formulas of the paper, one number after the other."""
    K = (raw.shape[-1] + 1) // 3
    axes = []
    for part in (raw[:K], raw[K : 2 * K]):
        sizes = MIN_BIN + (1 - K * MIN_BIN) * (part / 2).softmax(-1)
        axes.append([-bound + 2 * bound * sizes[:i].sum().item() for i in range(K)] + [bound])
    inner = MIN_SLOPE + torch.nn.functional.softplus(
        raw[2 * K :] + math.log(math.exp(1 - MIN_SLOPE) - 1)
    )
    return *axes, [1.0, *inner.tolist(), 1.0]


def paper(x, raw, bound=BOUND):
    """g(x) and g'(x) for |x| < bound: Durkan et al. 2019, eqs. 4 and 5."""
    xs, ys, d = knots(raw, bound)
    k = max(i for i in range(len(xs) - 1) if xs[i] <= x)
    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, xi = h / w, (x - xs[k]) / w
    below = s + (d[k + 1] + d[k] - 2 * s) * xi * (1 - xi)
    y = ys[k] + h * (s * xi**2 + d[k] * xi * (1 - xi)) / below
    slope = s**2 * (d[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + d[k] * (1 - xi) ** 2) / below**2
    return y, slope


@BINS
def test_formulas_of_the_paper(K):
    x, raw = draw(K, n=60, width=0.999 * BOUND)
    y, ladj = rq_spline(x, raw, bound=BOUND)
    expected = [paper(a.item(), r) for a, r in zip(x, raw, strict=True)]
    torch.testing.assert_close(y, torch.tensor([e[0] for e in expected], dtype=y.dtype))
    torch.testing.assert_close(ladj.exp(), torch.tensor([e[1] for e in expected], dtype=y.dtype))


@BINS
@DIRECTIONS
@pytest.mark.parametrize("scale", [0.7, 3.0])
def test_round_trip(K, inverse, scale):
    x, raw = draw(K, scale=scale)
    y, ladj = rq_spline(x, raw, bound=BOUND, inverse=inverse)
    back, back_ladj = rq_spline(y, raw, bound=BOUND, inverse=not inverse)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(back_ladj, -ladj, rtol=0, atol=1e-8)


@BINS
@DIRECTIONS
def test_ladj_is_the_logarithm_of_the_slope(K, inverse):
    x, raw = draw(K)
    x.requires_grad_()
    y, ladj = rq_spline(x, raw, bound=BOUND, inverse=inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope > 0).all()
    torch.testing.assert_close(ladj, slope.log(), rtol=1e-9, atol=1e-9)


@DIRECTIONS
@pytest.mark.parametrize("bound", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_is_the_identity(inverse, bound, dtype):
    x = torch.linspace(-2 * bound, 2 * bound, 301, dtype=torch.float64).to(dtype)
    for K in (1, 3, 8, 10):
        y, ladj = rq_spline(x, x.new_zeros(3 * K - 1), bound=bound, inverse=inverse)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y, x, rtol=0, atol=2 * eps * bound)
        torch.testing.assert_close(ladj, torch.zeros_like(x), rtol=0, atol=8 * eps)


@DIRECTIONS
def test_continuously_differentiable_at_knots_and_bounds(inverse):
    torch.manual_seed(3)
    raw = torch.randn(23, dtype=torch.float64)
    xs, ys, slopes = knots(raw)
    at = torch.tensor(ys if inverse else xs, dtype=torch.float64)
    to = torch.tensor(xs if inverse else ys, dtype=torch.float64)
    expected = torch.tensor(slopes, dtype=torch.float64).log() * (-1 if inverse else 1)
    for step in (-1e-10, 0.0, 1e-10):
        y, ladj = rq_spline(at + step, raw, bound=BOUND, inverse=inverse)
        torch.testing.assert_close(y, to, rtol=0, atol=1e-7)
        torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-6)


@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tails_are_the_identity_whatever_the_parameters(inverse, dtype):
    x = torch.tensor([BOUND, 3.1, 50.0, 1e30, torch.inf], dtype=dtype)
    x = torch.cat([-x, x]).requires_grad_()
    raw = (100 * torch.randn(len(x), 23, dtype=dtype)).requires_grad_()
    y, ladj = rq_spline(x, raw, bound=BOUND, inverse=inverse)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros_like(x))
    grad_x, grad_raw = torch.autograd.grad((y + ladj).sum(), (x, raw))
    assert torch.equal(grad_x, torch.ones_like(x))
    assert torch.equal(grad_raw, torch.zeros_like(raw))


@DIRECTIONS
@pytest.mark.parametrize("where", ["inside", "outside", "both"])
def test_gradients_are_finite_and_right(inverse, where):
    x = {
        "inside": torch.linspace(-2.9, 2.9, 7),
        "outside": torch.tensor([-9.0, -4.0, 3.5, 1e6]),
        "both": torch.tensor([-7.0, -3.5, -1.0, 0.2, 2.5, 1e6]),
    }[where].double()
    x.requires_grad_()
    raw = torch.randn(len(x), 11, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x, raw: rq_spline(x, raw, bound=BOUND, inverse=inverse), (x, raw)
    )


@DIRECTIONS
def test_gradients_at_the_identity(inverse):
    # To first order around the identity, g⁻¹(x; raw) = x - (g(x; raw) - x): at knots and in the middle of bins too.
    x = torch.linspace(-2.9, 2.9, 59, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([-1.125, 0.0, 0.375, 2.25], dtype=torch.float64)])
    raw = torch.zeros(len(x), 23, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rq_spline(x, raw, bound=BOUND, inverse=inverse)[0].sum(), raw)
    (other,) = torch.autograd.grad(
        rq_spline(x, raw, bound=BOUND, inverse=not inverse)[0].sum(), raw
    )
    assert (grad != 0).any(-1).all()
    torch.testing.assert_close(grad, -other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@DIRECTIONS
def test_stress(inverse, scale, dtype):
    x, raw = draw(n=20_000, scale=scale, dtype=dtype)
    x.requires_grad_()
    raw.requires_grad_()
    y, ladj = rq_spline(x, raw, bound=BOUND, inverse=inverse)
    assert y.isfinite().all()
    assert ladj.isfinite().all()
    assert (y.abs() <= x.abs().clamp_min(BOUND * (1 + 1e-6))).all()
    for grad in torch.autograd.grad(y.sum() + ladj.sum(), (x, raw)):
        assert grad.isfinite().all()


@DIRECTIONS
def test_stress_in_float32_is_as_exact_as_the_slope_allows(inverse):
    x, raw = draw(n=20_000, scale=10.0, dtype=torch.float32)
    y, ladj = rq_spline(x, raw, bound=BOUND, inverse=inverse)
    exact, exact_ladj = rq_spline(x.double(), raw.double(), bound=BOUND, inverse=inverse)
    # Rounding x alone, in the last of its 24 bits, moves y by slope times as much.
    assert ((y - exact).abs() / (1 + exact_ladj.exp())).max() < 5e-6
    back, _ = rq_spline(y, raw, bound=BOUND, inverse=not inverse)
    assert ((back - x).abs() / (1 + (-exact_ladj).exp())).max() < 5e-6
    assert (ladj - exact_ladj).abs().median() < 1e-4


@DIRECTIONS
def test_knots_themselves_and_their_neighbours(inverse):
    # The values where rounding decides the bin: every knot in float32, and the numbers next to it.
    raw = 10 * torch.randn(500, 23)
    zero = torch.zeros(500, 1)
    parts = (raw[:, 8 * inverse : 8 * (inverse + 1)] / 2).softmax(-1)
    inner = -BOUND + 2 * BOUND * (MIN_BIN + (1 - 8 * MIN_BIN) * parts).cumsum(-1)
    at = torch.cat([zero - BOUND, inner[:, :-1], zero + BOUND], -1)
    for x in (at, at.nextafter(at + 1), at.nextafter(at - 1)):
        y, ladj = rq_spline(x, raw.unsqueeze(1), bound=BOUND, inverse=inverse)
        assert y.isfinite().all()
        assert ladj.isfinite().all()


@DIRECTIONS
def test_increasing(inverse):
    x = torch.linspace(-4, 4, 5001, dtype=torch.float64)
    for _ in range(20):
        y, _ = rq_spline(x, 3 * torch.randn(23).double(), bound=BOUND, inverse=inverse)
        assert (y.diff() > 0).all()


@DIRECTIONS
@pytest.mark.parametrize(
    ("x_shape", "raw_shape"),
    [((), ()), ((5, 3), ()), ((5, 3), (3,)), ((3,), (5, 1)), ((0,), (0,)), ((0, 3), (3,))],
    ids=str,
)
def test_shapes_broadcast(inverse, x_shape, raw_shape):
    x, raw = torch.randn(x_shape).double(), torch.randn(*raw_shape, 11).double()
    y, ladj = rq_spline(x, raw, bound=BOUND, inverse=inverse)
    batch = torch.broadcast_shapes(x_shape, raw_shape)
    assert y.shape == ladj.shape == batch
    flat = (
        x.expand(batch).reshape(-1),
        raw.expand(*batch, 11).reshape(-1, 11) if y.numel() else torch.zeros(0, 11).double(),
    )
    expected = rq_spline(*flat, bound=BOUND, inverse=inverse)
    torch.testing.assert_close(y.reshape(-1), expected[0])
    torch.testing.assert_close(ladj.reshape(-1), expected[1])


def test_nan_stays_in_its_place():
    x, raw = torch.tensor([0.5, torch.nan, -7.0]), torch.randn(3, 11)
    y, _ = rq_spline(x, raw, bound=BOUND)
    assert y.isnan().tolist() == [False, True, False]


@DIRECTIONS
def test_function_transforms(inverse):
    x, raw = draw(3, n=9)

    def g(x, raw):
        return rq_spline(x, raw, bound=BOUND, inverse=inverse)

    y, ladj = g(x, raw)
    mapped = torch.vmap(g)(x, raw)
    torch.testing.assert_close(mapped, (y, ladj))
    slope = torch.vmap(torch.func.grad(lambda *a: g(*a)[0]))(x, raw)
    torch.testing.assert_close(slope, ladj.exp(), rtol=1e-9, atol=1e-12)
    jacobian = torch.func.jacrev(lambda x: g(x, raw)[0])(x)
    torch.testing.assert_close(jacobian, torch.diag(ladj.exp()), rtol=1e-9, atol=1e-12)


@DIRECTIONS
def test_meta(inverse):
    x, raw = torch.zeros(4, 3, device="meta"), torch.zeros(4, 3, 23, device="meta")
    y, ladj = rq_spline(x, raw, bound=BOUND, inverse=inverse)
    assert y.is_meta
    assert y.shape == ladj.shape == (4, 3)


def test_memory_is_linear_in_bins():
    def saved(K):
        """Numbers that autograd holds on to, an element."""
        x, raw = draw(K, n=1000, dtype=torch.float32)
        held = {}

        def pack(tensor):
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes() / 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rq_spline(x, raw.requires_grad_(), bound=BOUND)
        return sum(held.values()) / 1000

    sizes = [saved(K) for K in (10, 20, 40)]
    assert sizes[2] - sizes[1] < 2.5 * (sizes[1] - sizes[0])


@pytest.mark.parametrize("size", [0, 1, 3, 4, 24, 3 * 1000 - 1])
def test_wrong_numbers_of_parameters(size):
    with pytest.raises(ValueError, match=r"raw: expected shape \(\*, 3K - 1\)"):
        rq_spline(torch.zeros(2), torch.zeros(2, size), bound=BOUND)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_wrong_bound(bound):
    with pytest.raises(ValueError, match="bound: expected a positive number"):
        rq_spline(torch.zeros(2), torch.zeros(2, 2), bound=bound)
