"""Batch normalisation: the moments that it promises, its modes, caches that see its buffers; errors and stacks of both layers."""

import copy

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from normalizing import D, base, compiled, data, is_standard

from pyro_flows_ext.testing import POINTS
from pyro_flows_ext.transforms import ActNorm, ComposeFlow, ElementwiseAffine, LULinear, batchnorm

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
    with pytest.raises(ValueError, match=r"expected eval mode .* call \.eval\(\) first, or use"):
        t(torch.randn(5, D))
    with pytest.raises(ValueError, match="expected eval mode in the forward pass"):
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
        (lambda: ActNorm(0), "input_dim: expected a positive integer, got 0"),
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
        (ActNorm(3), "ActNorm(3)"),
        (batchnorm(3).inv, "BatchNorm(3, momentum=0.1, eps=1e-05).inv"),
        (ElementwiseAffine(3), "ElementwiseAffine(3)"),
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
        norm, batch = ActNorm(dim), batchnorm(dim)
        norm.initialize(rows)
        batch.set_statistics(rows)
        return ComposeFlow([norm, LULinear(dim, permute=True), batch.inv]).eval()

    for dtype in point.dtypes:
        point.check(build, dtype=dtype)
