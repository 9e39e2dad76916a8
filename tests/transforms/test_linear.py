"""Linear layers against dense linear algebra: matrices, determinants, inverses, signs, starts."""

import pyro.distributions as dist
import pytest
import torch
from linear_layers import EVERY, LAYERS, D, diagonal, matrix_of, permuted_lu

import pyro_flows_ext.transforms.linear as linear
from pyro_flows_ext.ops import householder_columns
from pyro_flows_ext.testing import POINTS, perturb
from pyro_flows_ext.transforms import (
    ActNorm,
    ComposeFlow,
    HouseholderLinear,
    LULinear,
    Permute,
    QRLinear,
    permute,
)


@pytest.mark.parametrize("make", [LAYERS["lu"], permuted_lu], ids=["plain", "permuted"])
def test_lu_is_the_product_of_its_factors(make):
    t = perturb(make().double())
    lu = t.lu.detach()
    L = lu.tril(-1) + torch.eye(D, dtype=lu.dtype)
    U = lu.triu(1) + diagonal(lu.diagonal()).diag()
    P = torch.eye(D, dtype=lu.dtype)
    P = P if t.permutation is None else P[t.permutation]
    W, b = matrix_of(t)
    torch.testing.assert_close(W, P @ L @ U)
    torch.testing.assert_close(b, P @ t.bias)


@pytest.mark.parametrize("K", [1, 2, 4, 7])
def test_qr_is_the_product_of_its_factors(K):
    t = perturb(QRLinear(D, num_reflections=K).double())
    R = t.r.detach().triu(1) + diagonal(t.r.detach().diagonal()).diag()
    W, b = matrix_of(t)
    torch.testing.assert_close(W, householder_columns(t.v) @ R)
    torch.testing.assert_close(b, t.bias)


@pytest.mark.parametrize("K", [1, 2, 4, 7])
def test_householder_is_the_product_of_its_reflections(K):
    t = perturb(HouseholderLinear(D, num_reflections=K).double())
    W, _ = matrix_of(t)
    torch.testing.assert_close(W, householder_columns(t.v))
    torch.testing.assert_close(W @ W.mT, torch.eye(D, dtype=W.dtype), rtol=0, atol=1e-14)


@EVERY
@pytest.mark.parametrize("num_rows", [3, 2**15 // D], ids=["few-rows", "many-rows"])
def test_against_dense_linear_algebra(make, num_rows):
    t = perturb(make().double())
    W, b = matrix_of(t)
    x = torch.randn(num_rows, D, dtype=torch.float64)
    y, ladj = t.forward_and_ladj(x)
    torch.testing.assert_close(y, x @ W.mT + b)
    sign, expected = torch.linalg.slogdet(W)
    torch.testing.assert_close(ladj, expected.expand(num_rows))
    assert int(torch.as_tensor(t.sign)) == int(sign)
    back, ladj = t.inverse_and_ladj(x)
    torch.testing.assert_close(back, torch.linalg.solve(W, (x - b).mT).mT)
    torch.testing.assert_close(ladj, -expected.expand(num_rows))


@EVERY
def test_gradients_are_the_same_whether_factors_are_multiplied_out_or_not(make, monkeypatch):
    t = perturb(make().double())
    x = torch.randn(4 * D, D, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 4 * D, D, dtype=torch.float64)
    results = []
    for threshold in (0, 2**62):
        monkeypatch.setattr(linear, "FORM_ABOVE", threshold)
        out = torch.stack([t.forward_and_ladj(x)[0], t.inverse_and_ladj(x)[0]])
        results.append(torch.autograd.grad((weights * out).sum(), [x, *t.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@EVERY
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_under_torch_func(make, batch):
    t = perturb(make().double())
    x = torch.randn(*batch, D, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: t.inverse_and_ladj(x)[0])
    for _ in batch:
        jacobian = torch.func.vmap(jacobian)
    W, _ = matrix_of(t)
    torch.testing.assert_close(jacobian(x), torch.linalg.inv(W).expand(*batch, D, D))


@EVERY
def test_no_rows(make):
    y, ladj = make().forward_and_ladj(torch.zeros(2, 0, D))
    assert y.shape == (2, 0, D)
    assert ladj.shape == (2, 0)
    assert make().inverse_and_ladj(y)[0].shape == (2, 0, D)


@pytest.mark.parametrize("make", list(LAYERS.values())[:-1], ids=list(LAYERS)[:-1])
def test_vmap_over_parameters(make):
    t = make().double()
    parameters = {n: p + torch.randn(3, *p.shape, dtype=p.dtype) for n, p in t.named_parameters()}
    x = torch.randn(5, D, dtype=torch.float64)

    def run(parameters):
        y = torch.func.functional_call(t, parameters, (x,))
        return y, t.bind(parameters).inverse_and_ladj(x)[1]

    y, ladj = torch.func.vmap(run)(parameters)
    for i in range(3):
        alone = t.bind({name: p[i] for name, p in parameters.items()})
        torch.testing.assert_close(y[i], alone.forward_and_ladj(x)[0])
        torch.testing.assert_close(ladj[i], alone.inverse_and_ladj(x)[1])


# --- the start ---


@pytest.mark.parametrize("make", [LULinear, QRLinear, HouseholderLinear])
@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_starts_near_the_identity(make, dim):
    W, b = matrix_of(make(dim).double())
    distance = (W - torch.eye(dim, dtype=W.dtype)).abs().max()
    assert distance == 0 if make is LULinear else distance < 0.2
    assert (b == 0).all()


def test_starts_at_the_permutation():
    t = LULinear(D, permute=True)
    x = torch.randn(3, D)
    assert torch.equal(t(x), x[:, t.permutation])


def test_odd_number_of_reflections_starts_at_a_mirror():
    W, _ = matrix_of(HouseholderLinear(16, num_reflections=3).double())
    singular = torch.linalg.svdvals(W - torch.eye(16, dtype=W.dtype))
    assert singular[0] > 1.9
    assert singular[1] < 0.2


@pytest.mark.parametrize("make", [QRLinear, HouseholderLinear])
def test_reaches_any_rotation(make):
    """From the start: so no gradient vanishes there, and D reflections leave no rotation out of reach."""
    target = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    target[0] *= torch.linalg.det(target).sign()
    t = make(D).double()
    optimizer = torch.optim.LBFGS(t.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (matrix_of(t)[0] - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure() < 1e-8


def test_a_density_of_linear_layers_learns_a_gaussian():
    scale_tril = torch.tensor([[2.0, 0.0, 0.0], [3.0, 0.5, 0.0], [-1.0, 0.4, 0.1]]).double()
    data = torch.tensor([1.0, -5.0, 20.0]) + torch.randn(500, 3).double() @ scale_tril.mT
    norm = ActNorm(3).double()
    norm.initialize(data, inverse=True)
    flow = ComposeFlow([LULinear(3).double(), norm])
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    density = dist.TransformedDistribution(base, [flow])
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -density.log_prob(data).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    # The best Gaussian's mean log-density is minus the entropy of the Gaussian with the data's moments.
    best = dist.MultivariateNormal(data.mean(0), data.mT.cov(correction=0)).entropy()
    torch.testing.assert_close(closure().detach(), best, rtol=0, atol=1e-5)


# --- with a context ---


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (LULinear, {"permute": True, "bias": False}),
        (QRLinear, {"num_reflections": 3, "bias": False}),
        (HouseholderLinear, {"num_reflections": 3}),
    ],
    ids=["lu", "qr", "householder"],
)
def test_starts_at_every_context_as_the_transform_does(make, options):
    t = make(D, context_dim=2, hidden_dims=(4,), **options)
    x = torch.randn(3, D)
    y, ladj = t.condition(torch.randn(3, 2)).forward_and_ladj(x)
    expected, expected_ladj = t.bind({}).forward_and_ladj(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, expected_ladj)
    for name, value in options.items():
        assert f"{name}={value}" in repr(t)


# --- errors, repr, contract ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LULinear(0), "input_dim: expected a positive integer, got 0"),
        (lambda: QRLinear(3, num_reflections=0), "num_reflections: expected a positive integer"),
        (lambda: Permute([0, 2]), r"expected each of 0 to D - 1 once, .* got \[0, 2\]"),
        (lambda: Permute([]), "expected each of 0 to D - 1 once"),
        (lambda: Permute(torch.zeros(1, 1)), "in one dimension"),
        (lambda: permute(3, kind="odd"), "kind: expected one of reverse, random; got 'odd'"),
        (lambda: permute(-1), "input_dim: expected a positive integer"),
        (lambda: LULinear(3)(torch.zeros(2)), r"x: expected a tensor of shape \(\*, 3\)"),
        (lambda: QRLinear(3).inv(torch.zeros(2)), r"y: expected a tensor of shape \(\*, 3\)"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (LULinear(3), "LULinear(3, bias=True, permute=False)"),
        (QRLinear(5), "QRLinear(5, num_reflections=4, bias=True)"),
        (HouseholderLinear(1), "HouseholderLinear(1, num_reflections=2)"),
        (permute(3), "Permute(3)"),
        (
            LULinear(3, context_dim=2),
            "LULinear(3, bias=True, permute=False, context_dim=2)",
        ),
    ],
    ids=str,
)
def test_repr(transform, expected):
    assert repr(transform) == expected


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS.values(), ids=str)
def test_contract_of_a_stack(point):
    """One layer of each kind, the forms that the catalogue leaves out: few reflections, many, no bias."""
    dim = 2 if point.number == 14 else 3

    def build():
        parts = [
            LULinear(dim, bias=False, permute=True),
            QRLinear(dim, num_reflections=1),
            HouseholderLinear(dim, num_reflections=5),
            permute(dim).inv,
        ]
        return ComposeFlow([*parts, LULinear(dim).inv])

    for dtype in point.dtypes:
        point.check(build, dtype=dtype)
