"""ActNorm and batch normalisation: the moments that they promise, their modes, and caches that see their buffers."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

from pyro_flows_ext.testing import POINTS
from pyro_flows_ext.transforms import ComposeFlow, actnorm, batchnorm, elementwise_affine, lu_linear

D = 3
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def data(*batch, dtype=torch.float64):
    scale = torch.tensor([0.01, 1.0, 300.0])
    return (torch.randn(*batch, D) * scale + torch.tensor([5.0, 0.0, -1e3])).to(dtype)


def through(transform, batch, inverse):
    return transform.inverse_and_ladj(batch) if inverse else transform.forward_and_ladj(batch)


def is_standard(out, tolerance=1e-10):
    rows = out.detach().reshape(-1, D)
    return (
        rows.mean(0).abs().max() < tolerance
        and (rows.std(0, correction=0) - 1).abs().max() < tolerance
    )


def base():
    return dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


# --- ActNorm ---


@INVERSE
@pytest.mark.parametrize("batch", [(2,), (50,), (4, 5)], ids=str)
def test_initialize_standardises_the_batch(inverse, batch):
    t, x = actnorm(D).double(), data(*batch)
    t.initialize(x, inverse=inverse)
    out, ladj = through(t, x, inverse)
    assert is_standard(out)
    expected = -x.reshape(-1, D).std(0, correction=0).log().sum()
    torch.testing.assert_close(ladj, expected.expand(batch))


@INVERSE
def test_initialize_in_float32(inverse):
    t, x = actnorm(D), data(100, dtype=torch.float32)
    t.initialize(x, inverse=inverse)
    assert t.loc.dtype == torch.float32
    # A mean of 5 with a standard deviation of 0.01 leaves float32 four to five digits.
    assert is_standard(through(t, x, inverse)[0], 1e-3)


@INVERSE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_constant_column_is_centred_and_keeps_its_scale(inverse, dtype, value):
    x = data(1000, dtype=dtype)
    x[:, 1] = value
    t = actnorm(D).to(dtype)
    t.initialize(x, inverse=inverse)
    assert t.log_scale[1] == 0
    assert through(t, x, inverse)[0][:, 1].abs().max() <= 1e-6 * abs(value)
    assert t.log_scale[0] != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_column_that_is_constant_to_rounding_keeps_its_scale(dtype):
    x = data(1000, dtype=dtype)
    last_place = torch.finfo(dtype).eps * torch.randint(-2, 3, (1000,))
    x[:, 1] = -1e6 * (1 + last_place).to(dtype)
    t = actnorm(D).to(dtype)
    t.initialize(x)
    assert t.log_scale[1] == 0


def test_a_narrow_column_is_not_constant():
    x = data(100)
    x[:, 0] *= 1e-12
    t = actnorm(D).double()
    t.initialize(x)
    assert is_standard(t.forward_and_ladj(x)[0], 1e-2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(D), r"at least 2 rows .* got shape \(3,\)"),
        (torch.zeros(1, D), r"at least 2 rows .* got shape \(1, 3\)"),
        (torch.zeros(0, D), "at least 2 rows"),
        (torch.zeros(5, 2), r"expected a tensor of shape \(\*, 3\)"),
        (torch.full((5, D), torch.nan), "expected finite values"),
        (torch.full((5, D), torch.inf), "expected finite values"),
    ],
    ids=["vector", "one-row", "no-row", "dim", "nan", "inf"],
)
def test_initialize_refuses(batch, message):
    t = actnorm(D)
    with pytest.raises(ValueError, match=message):
        t.initialize(batch)
    assert not t.initialized
    assert (t.loc == 0).all()


def test_initialized_is_part_of_the_state():
    t = actnorm(D).double()
    assert not t.state_dict()["initialized"]
    t.initialize(data(10))
    twin = actnorm(D).double()
    twin.load_state_dict(t.state_dict())
    for other in (twin, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.float()):
        assert other.initialized.dtype == torch.bool
        assert other.initialized
        torch.testing.assert_close(other.loc.double(), t.loc.double())


def test_initialize_keeps_parameters_and_leaves_no_stale_log_det():
    t, x = actnorm(D).double(), data(10)
    parameters = list(t.parameters())
    y = t(x)
    assert (t.log_abs_det_jacobian(x, y) == 0).all()
    t.initialize(x)
    assert all(a is b for a, b in zip(parameters, t.parameters(), strict=True))
    assert all(p.requires_grad and p.grad_fn is None for p in t.parameters())
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), t.log_scale.sum().expand(10))
    assert (t.log_abs_det_jacobian(x, y) != 0).all()


@INVERSE
def test_first_batch(inverse):
    t, first, second = actnorm(D, initialize_on_first_batch=True).double(), data(20), data(30) * 2
    assert is_standard(through(t, first, inverse)[0])
    loc = t.loc.clone()
    assert t.initialized
    assert not is_standard(through(t, second, inverse)[0])
    through(t, second, not inverse)
    assert torch.equal(t.loc, loc)


@INVERSE
def test_first_batch_through_a_density(inverse):
    t, x = actnorm(D, initialize_on_first_batch=True).double(), data(20)
    density = dist.TransformedDistribution(base(), [t if inverse else t.inv])
    loss = -density.log_prob(x).mean()
    # Of standardised data the squares have mean 1, and the log-det is that of the batch.
    expected = D * (0.5 + 0.5 * torch.log(torch.tensor(2 * torch.pi)))
    torch.testing.assert_close(
        loss.double(), expected.double() + x.std(0, correction=0).log().sum()
    )
    loss.backward()
    assert all(p.grad.isfinite().all() for p in t.parameters())


@pytest.mark.parametrize(
    ("is_asked_for", "training", "batch"),
    [(True, False, (20,)), (True, True, (1,)), (True, True, ()), (False, True, (20,))],
    ids=["eval", "one-row", "vector", "default"],
)
def test_first_batch_waits(is_asked_for, training, batch):
    t = actnorm(D, initialize_on_first_batch=is_asked_for).double().train(training)
    x = data(*batch)
    assert torch.equal(t(x), x)
    assert torch.equal(t.inv(x), x)
    assert not t.initialized


def test_state_that_is_loaded_is_not_initialised_again():
    t = actnorm(D).double()
    t.initialize(data(10))
    twin = actnorm(D, initialize_on_first_batch=True).double()
    twin.load_state_dict(t.state_dict())
    twin(data(10) + 1)
    assert torch.equal(twin.loc, t.loc)


@INVERSE
def test_first_batch_compiled(inverse):
    t = actnorm(D, initialize_on_first_batch=True).double()
    eager = copy.deepcopy(t)
    run = compiled(lambda x: through(t, x, inverse))
    bad = data(20)
    bad[0] = torch.nan
    run(bad)
    assert not t.initialized  # nothing to be learned from a batch that is not finite
    for batch in (data(20), data(20) * 2):
        results = run(batch), through(eager, batch, inverse)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        grads = [
            torch.autograd.grad(out.sum(), t_.loc)
            for t_, (out, _) in zip((t, eager), results, strict=True)
        ]
        torch.testing.assert_close(*grads)
    assert t.initialized
    torch.testing.assert_close(t.loc, eager.loc)
    torch._dynamo.reset()


# --- batch normalisation ---


def perturbed_batchnorm(**options):
    t = batchnorm(D, **options).double()
    with torch.no_grad():
        for tensor in (*t.parameters(), t.moving_mean, t.moving_var):
            tensor.add_(torch.rand_like(tensor))
    return t


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.4, "eps": 0.1}], ids=["default", "other"])
def test_inverse_is_torchs_batch_norm(training, options):
    t = perturbed_batchnorm(**options).train(training)
    mean, var = t.moving_mean.clone(), t.moving_var.clone()
    y = data(20).requires_grad_()
    x, ladj = t.inverse_and_ladj(y)
    expected = F.batch_norm(
        y, mean, var, t.gamma.exp(), t.beta, training, momentum=t.momentum, eps=t.eps
    )
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(t.moving_mean, mean)
    torch.testing.assert_close(t.moving_var, var)
    weights, wanted = torch.randn_like(x), [y, *t.parameters()]
    grads = [torch.autograd.grad((weights * out).sum(), wanted) for out in (x, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    used = y.var(0, correction=0) if training else var
    log_det = (t.gamma - 0.5 * (used + t.eps).log()).sum()
    torch.testing.assert_close(ladj, log_det.expand(20))


def test_log_det_in_training_has_the_gradient_of_the_batch():
    t = perturbed_batchnorm()
    y = data(6).requires_grad_()
    (grad,) = torch.autograd.grad(t.inverse_and_ladj(y)[1].sum(), y)
    d = y.detach() - y.detach().mean(0)
    torch.testing.assert_close(grad, -d / (d.square().mean(0) + t.eps))


def test_forward_in_training_is_refused():
    t = batchnorm(D)
    with pytest.raises(ValueError, match=r"forward pass has none; call \.eval\(\) first, or use"):
        t(torch.randn(5, D))
    with pytest.raises(ValueError, match="forward pass has none"):
        t.inv.inverse_and_ladj(torch.randn(5, D))
    assert is_standard(t.double().inv(data(50)), 0.1)


@pytest.mark.parametrize("shape", [(D,), (1, D), (0, D)], ids=str)
def test_training_needs_two_rows(shape):
    t = batchnorm(D)
    with pytest.raises(ValueError, match="at least 2 rows"):
        t.inverse_and_ladj(torch.zeros(shape))
    assert t.eval().inverse_and_ladj(torch.zeros(shape))[0].shape == shape


def test_scoring_moves_the_statistics_once():
    t, y = batchnorm(D).double(), data(20)
    density = dist.TransformedDistribution(base(), [t])
    expected = 0.9 * t.moving_mean + 0.1 * y.mean(0)
    log_prob = density.log_prob(y)
    torch.testing.assert_close(t.moving_mean, expected)
    x, ladj = batchnorm(D).double().inverse_and_ladj(y)
    torch.testing.assert_close(log_prob, base().log_prob(x) + ladj)


def test_log_det_in_training_without_the_cache():
    t, y = perturbed_batchnorm(), data(20)
    x, ladj = t.inverse_and_ladj(y)
    moved = t.moving_mean.clone()
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), -ladj)
    torch.testing.assert_close(t.inv.log_abs_det_jacobian(y, x), ladj)
    assert torch.equal(t.moving_mean, moved)
    # Remembered, then driven out by another batch.
    x = t.inv(y)
    t.inv(data(20))
    torch.testing.assert_close(t.log_abs_det_jacobian(x, y), -ladj)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.set_statistics(data(50)),
        lambda t: (t.train().inverse_and_ladj(data(50)), t.eval()),
        lambda t: t.moving_var.mul_(3),
        lambda t: t.load_state_dict(batchnorm(D).state_dict()),
    ],
    ids=["set_statistics", "training-pass", "in-place", "load_state_dict"],
)
def test_no_stale_log_det_after_the_buffers_move(change):
    t, x = perturbed_batchnorm().eval(), data(20)
    y = t(x)
    before = t.log_abs_det_jacobian(x, y)
    change(t)
    after = t.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(
        after, (0.5 * (t.moving_var + t.eps).log() - t.gamma).sum().expand(20)
    )
    assert (after - before).abs().min() > 1e-3
    torch.testing.assert_close(t(x), t.forward_and_ladj(x)[0])


def test_moving_the_buffers_leaves_earlier_graphs_alone():
    t, x = perturbed_batchnorm().eval(), data(20)
    y, ladj = t.forward_and_ladj(x)
    t.train().inverse_and_ladj(data(20))
    (y.sum() + ladj.sum()).backward()
    assert all(p.grad.isfinite().all() for p in t.parameters())


def test_set_statistics_standardises_in_eval_mode():
    t, y = batchnorm(D, eps=1e-12).double().eval(), data(4, 50)
    t.set_statistics(y)
    # The moving variance divides by one less than the number of rows.
    assert is_standard(t.inverse_and_ladj(y)[0] * (200 / 199) ** 0.5, 1e-8)
    with pytest.raises(ValueError, match="at least 2 rows"):
        t.set_statistics(y[0, :1])


def test_statistics_converge_to_those_of_the_data():
    t = batchnorm(D).double()
    for _ in range(200):
        t.inverse_and_ladj(data(500))
    y = t.eval().inverse_and_ladj(data(5000))[0]
    assert is_standard(y, 0.1)


def test_constant_column_stays_finite():
    t = batchnorm(D).double()
    y = data(20)
    y[:, 1] = 7.0
    y.requires_grad_()
    x, ladj = t.inverse_and_ladj(y)
    (grad,) = torch.autograd.grad(x.square().sum() + ladj.sum(), y)
    assert (x[:, 1] == 0).all()
    assert ladj.isfinite().all()
    assert grad.isfinite().all()


def test_training_compiled():
    t = perturbed_batchnorm()
    eager, y = copy.deepcopy(t), data(20)

    def nll(t):
        def run(y):
            x = t.inv(y)
            return (0.5 * x.square().sum(-1) + t.log_abs_det_jacobian(x, y)).mean()

        return run

    losses = compiled(nll(t))(y), nll(eager)(y)
    torch.testing.assert_close(*losses)
    for a, b in zip(t.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(losses[0], a, retain_graph=True),
            torch.autograd.grad(losses[1], b, retain_graph=True),
        )
    torch.testing.assert_close(t.moving_mean, eager.moving_mean)
    torch.testing.assert_close(t.moving_var, eager.moving_var)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: actnorm(0), "input_dim: expected a positive integer, got 0"),
        (lambda: batchnorm(2.5), "input_dim: expected a positive integer, got 2.5"),
        (lambda: batchnorm(2, momentum=0.0), r"momentum: expected a number in \(0, 1\], got 0.0"),
        (lambda: batchnorm(2, momentum=2), r"momentum: expected a number in \(0, 1\], got 2"),
        (lambda: batchnorm(2, eps=0.0), "eps: expected a positive number, got 0.0"),
        (lambda: batchnorm(2).inv(torch.zeros(4, 3)), r"y: expected a tensor of shape \(\*, 2\)"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (actnorm(3), "ActNorm(3)"),
        (batchnorm(3).inv, "BatchNorm(3, momentum=0.1, eps=1e-05).inv"),
        (elementwise_affine(3), "ElementwiseAffine(3)"),
    ],
    ids=str,
)
def test_repr(transform, expected):
    assert repr(transform) == expected


@pytest.mark.parametrize("point", POINTS.values(), ids=str)
def test_contract_of_a_stack(point):
    """A Glow step in vectors, initialised from data, and a batch norm in its other orientation."""
    dim = 2 if point.number == 14 else D

    def build():
        rows = 2 * torch.randn(20, dim) + 1
        norm, batch = actnorm(dim), batchnorm(dim)
        norm.initialize(rows)
        batch.set_statistics(rows)
        return ComposeFlow([norm, lu_linear(dim, permute=True), batch.inv]).eval()

    for dtype in point.dtypes:
        point.check(build, dtype=dtype)
