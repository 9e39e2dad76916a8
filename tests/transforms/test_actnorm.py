"""ActNorm: the moments that it promises, its modes, and caches that see its state."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from normalizing import INVERSE, D, base, compiled, data, is_standard, through

from pyro_flows_ext.transforms import ActNorm

# --- ActNorm ---


@INVERSE
@pytest.mark.parametrize("batch", [(2,), (50,), (4, 5)], ids=str)
def test_initialize_standardises_the_batch(inverse, batch):
    t, x = ActNorm(D).double(), data(*batch)
    t.initialize(x, inverse=inverse)
    out, ladj = through(t, x, inverse)
    assert is_standard(out)
    expected = -x.reshape(-1, D).std(0, correction=0).log().sum()
    torch.testing.assert_close(ladj, expected.expand(batch))


@INVERSE
def test_initialize_in_float32(inverse):
    t, x = ActNorm(D), data(100, dtype=torch.float32)
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
    t = ActNorm(D).to(dtype)
    t.initialize(x, inverse=inverse)
    assert t.log_scale[1] == 0
    assert through(t, x, inverse)[0][:, 1].abs().max() <= 1e-6 * abs(value)
    assert t.log_scale[0] != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_column_that_is_constant_to_rounding_keeps_its_scale(dtype):
    x = data(1000, dtype=dtype)
    last_place = torch.finfo(dtype).eps * torch.randint(-2, 3, (1000,))
    x[:, 1] = -1e6 * (1 + last_place).to(dtype)
    t = ActNorm(D).to(dtype)
    t.initialize(x)
    assert t.log_scale[1] == 0


def test_a_narrow_column_is_not_constant():
    x = data(100)
    x[:, 0] *= 1e-12
    t = ActNorm(D).double()
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
    t = ActNorm(D)
    with pytest.raises(ValueError, match=message):
        t.initialize(batch)
    assert not t.initialized
    assert (t.loc == 0).all()


def test_initialized_is_part_of_the_state():
    t = ActNorm(D).double()
    assert not t.state_dict()["initialized"]
    t.initialize(data(10))
    twin = ActNorm(D).double()
    twin.load_state_dict(t.state_dict())
    for other in (twin, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.float()):
        assert other.initialized.dtype == torch.bool
        assert other.initialized
        torch.testing.assert_close(other.loc.double(), t.loc.double())


def test_initialize_keeps_parameters_and_leaves_no_stale_log_det():
    t, x = ActNorm(D).double(), data(10)
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
    t, first, second = ActNorm(D, initialize_on_first_batch=True).double(), data(20), data(30) * 2
    assert is_standard(through(t, first, inverse)[0])
    loc = t.loc.clone()
    assert t.initialized
    assert not is_standard(through(t, second, inverse)[0])
    through(t, second, not inverse)
    assert torch.equal(t.loc, loc)


@INVERSE
def test_first_batch_through_a_density(inverse):
    t, x = ActNorm(D, initialize_on_first_batch=True).double(), data(20)
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
    t = ActNorm(D, initialize_on_first_batch=is_asked_for).double().train(training)
    x = data(*batch)
    assert torch.equal(t(x), x)
    assert torch.equal(t.inv(x), x)
    assert not t.initialized


def test_state_that_is_loaded_is_not_initialised_again():
    t = ActNorm(D).double()
    t.initialize(data(10))
    twin = ActNorm(D, initialize_on_first_batch=True).double()
    twin.load_state_dict(t.state_dict())
    twin(data(10) + 1)
    assert torch.equal(twin.loc, t.loc)


@pytest.mark.slow
@INVERSE
def test_first_batch_compiled(inverse):
    t = ActNorm(D, initialize_on_first_batch=True).double()
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
