"""`LogJoint` against densities written by hand, closed forms, and Pyro's own traces."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

from pyro_flows_ext.programs import LogJoint, unconstrain

GROUP = torch.tensor([0, 1, 1, 2, 0, 2, 1])
X = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(7, 3)
Y = torch.linspace(-2, 2, 7, dtype=torch.float64)


def hierarchical(group=GROUP, X=X, y=Y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.ones((), dtype=torch.float64)))
    with pyro.plate("groups", 3):
        alpha = pyro.sample("alpha", dist.Normal(mu, tau))
    w = pyro.sample("w", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("data", 7):
        pyro.sample("y", dist.Normal(alpha[group] + X @ w, 0.5), obs=y)


def schools(y=Y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.ones((), dtype=torch.float64)))
    with pyro.plate("data", 7):
        eta = pyro.sample("eta", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, 0.5), obs=y)


def undeclared(y=Y):
    """A batch dimension without a plate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def three_data(y=Y[:3]):
    """As many data as particles are compared."""
    undeclared(y)


def branches(y=Y):
    """Reads a value in Python, which no batch can."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    scale = 1.0 if mu.item() > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


MISSING = torch.tensor([False, True, False, False, True, False, False])


def missing_values(y=Y):
    """Latents written into a copy of the data in place, which one tensor cannot hold for all particles."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
    with pyro.plate("unseen", 2):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
    full = y.clone()
    full[MISSING] = z
    same = full
    scale = torch.zeros(7, dtype=torch.float64)
    scale += z.exp().sum()
    with pyro.plate("data", 7):
        pyro.sample("y", dist.Normal(torch.stack([full, same]).mean(0), scale), obs=y.flip(0))


def through_a_view(y=Y):
    """Writes to a row of a matrix that is read afterwards."""
    z = pyro.sample("z", dist.Normal(torch.zeros(7, dtype=torch.float64), 1.0).to_event(1))
    both = torch.zeros(2, 7, dtype=torch.float64)
    row = both[0]
    row[:] = z
    with pyro.plate("data", 7):
        pyro.sample("y", dist.Normal(both.sum(0), 1.0), obs=y)


def by_hand(model, log_joint, u):
    """The log joint of single traces of the model, plus the log-determinant of the constraint."""
    values = log_joint.constrain(u)
    ladj = -unconstrain(values, log_joint.latents)[1]
    totals = []
    for i in range(len(u)):
        one = {name: value[i] for name, value in values.items()}
        trace = poutine.trace(poutine.condition(model, data=one)).get_trace()
        totals.append(trace.log_prob_sum())
    # `unconstrain` gives the log-determinant of the forward map.
    return torch.stack(totals) - ladj


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (schools, "handlers"),
        (hierarchical, "vmap"),
        (undeclared, "vmap"),
        (three_data, "vmap"),
        (missing_values, "vmap"),
        (through_a_view, "loop"),
        (branches, "loop"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_equals_single_traces(model, method):
    log_joint = LogJoint(model)
    assert log_joint.method == method
    assert (log_joint.vectorization_error is None) == (method != "loop")
    u = 0.7 * torch.randn(5, log_joint.dim, dtype=torch.float64)
    torch.testing.assert_close(log_joint(u), by_hand(model, log_joint, u))
    batched = log_joint(u[:4].reshape(2, 2, -1))
    torch.testing.assert_close(batched.flatten(), log_joint(u[:4]))


def test_a_write_that_no_batch_can_make_is_named():
    error = LogJoint(through_a_view).vectorization_error
    assert "__setitem__ writes values that differ between particles through a view" in error


def test_tensors_that_are_written_to_keep_their_values():
    data = Y.clone()

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        data[0] = z
        with pyro.plate("data", 7):
            pyro.sample("y", dist.Normal(data, 1.0), obs=Y)

    log_joint = LogJoint(model)
    before = data.clone()
    log_joint(torch.randn(4, 1, dtype=torch.float64))
    torch.testing.assert_close(data, before, rtol=0, atol=0)


@pytest.mark.parametrize("model", [schools, hierarchical, missing_values], ids=lambda m: m.__name__)
def test_derivatives(model):
    log_joint = LogJoint(model)
    u = 0.3 * torch.randn(2, log_joint.dim, dtype=torch.float64)
    torch.autograd.gradcheck(log_joint, u.requires_grad_())
    value, gradient = log_joint.value_and_gradient(u)
    H = torch.autograd.functional.hessian(log_joint, u[0].detach())
    torch.testing.assert_close(log_joint.hessian(u[0]), H)
    assert not value.requires_grad
    assert gradient.shape == u.shape


def test_parameters_of_the_model_get_gradients():
    net = nn.Linear(1, 1).double()

    def model():
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(2.0, dtype=torch.float64))
        z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(net(z).squeeze(-1), scale), obs=Y[0])

    log_joint = LogJoint(model)
    u = torch.randn(4, 1, dtype=torch.float64)
    log_joint(u).sum().backward()
    pyro.clear_param_store()
    expected = [p.grad.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    sum(log_joint(row) for row in u).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)
    assert len(log_joint.parameters) == 3


# --- supports, masks, enumeration ---


def test_supports_that_depend_on_latents_are_followed():
    def model():
        a = pyro.sample("a", dist.LogNormal(math.log(10.0), 0.5))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(18.0))

    log_joint = LogJoint(model)
    u = torch.tensor([[1.0, 3.0], [4.0, -2.0]])
    values = log_joint.constrain(u)
    torch.testing.assert_close(values["b"], values["a"] * u[:, 1].sigmoid())
    prior = dist.LogNormal(math.log(10.0), 0.5).log_prob(values["a"]) + u[:, 0]
    slope = u[:, 1].sigmoid() * (-u[:, 1]).sigmoid()
    likelihood = dist.Normal(values["a"] + values["b"], 1.0).log_prob(torch.tensor(18.0))
    torch.testing.assert_close(log_joint(u), prior + slope.log() + likelihood)


def test_masked_latents_have_their_prior():
    mask = torch.tensor([True, True, False])

    def model():
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(3))

    u = torch.randn(6, 3)
    normal = dist.Normal(0.0, 1.0).log_prob
    expected = normal(u).sum(-1) + normal(1 - u)[:, :2].sum(-1)
    torch.testing.assert_close(LogJoint(model)(u), expected)


def test_a_masked_prior_in_use_stays_masked():
    """Masking a prior makes it flat: the likelihood still depends on the latent."""

    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    u = torch.randn(6, 1)
    torch.testing.assert_close(
        LogJoint(model)(u), dist.Normal(u[:, 0], 1.0).log_prob(torch.tensor(3.0))
    )


@config_enumerate
def mixture(y=Y, scale=1.0):
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=torch.float64), 2.0))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=torch.float64), 2.0).to_event(1))
    with pyro.plate("data", len(y)), poutine.scale(scale=scale):
        k = pyro.sample("k", dist.Bernoulli(p)).long()
        pyro.sample("y", dist.Normal(mu[..., k], 0.5), obs=y)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_enumerated_latents_are_summed_out(scale):
    log_joint = LogJoint(mixture, (Y, scale))
    assert log_joint.method == "vmap"
    u = torch.randn(5, 3, dtype=torch.float64)
    p, mu = u[:, :1].sigmoid(), u[:, 1:]
    parts = torch.stack([torch.log1p(-p), p.log()], -1)
    parts = parts + dist.Normal(mu.unsqueeze(1), 0.5).log_prob(Y.unsqueeze(-1))
    expected = scale * parts.logsumexp(-1).sum(-1) + dist.Normal(0.0, 2.0).log_prob(mu).sum(-1)
    expected = expected + dist.Beta(2.0, 2.0).log_prob(p[:, 0]) + (p * (1 - p)).log()[:, 0]
    torch.testing.assert_close(log_joint(u), expected)


def test_enumerated_chain_equals_trace_enum():
    @config_enumerate
    def chain():
        stay = pyro.sample("stay", dist.Beta(torch.tensor(4.0, dtype=torch.float64), 2.0))
        z = torch.tensor(0)
        for t in pyro.markov(range(5)):
            up = torch.where(z == 1, stay, 1 - stay)
            z = pyro.sample(f"z{t}", dist.Bernoulli(up)).long()
            pyro.sample(f"y{t}", dist.Normal(2.0 * z.to(Y.dtype), 1.0), obs=Y[t])

    log_joint = LogJoint(chain)
    u = torch.randn(3, 1, dtype=torch.float64)
    for row, value in zip(u, log_joint(u), strict=True):
        data = {name: v[0] for name, v in log_joint.constrain(row.unsqueeze(0)).items()}
        conditioned = poutine.condition(chain, data=data)
        loss = TraceEnum_ELBO(max_plate_nesting=0).loss(conditioned, lambda: None)
        ladj = (row.sigmoid() * (-row).sigmoid()).log().sum()
        torch.testing.assert_close(value, ladj - loss)


# --- refusals, and models that raise ---


def test_refuses_what_the_guide_lacks():
    def forgotten(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    latents = LogJoint(forgotten, (torch.tensor(1.0),)).latents
    with pytest.raises(ValueError, match="latent 'y' of the model"):
        LogJoint(forgotten, latents=latents)

    def discrete():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="config_enumerate"):
        LogJoint(discrete, latents=latents)
    with pytest.raises(ValueError, match="observed by the model"):
        LogJoint(poutine.condition(discrete, data={"mu": torch.zeros(())}), latents=latents)


def cholesky():
    rho = pyro.sample("rho", dist.Normal(torch.zeros((), dtype=torch.float64), 0.1))
    eye = torch.eye(2, dtype=torch.float64)
    cov = eye + rho[..., None, None] * (1 - eye)
    scale_tril = torch.linalg.cholesky(cov)
    zeros = torch.zeros(2, dtype=torch.float64)
    pyro.sample("y", dist.MultivariateNormal(zeros, scale_tril=scale_tril), obs=zeros)


def test_failed_factorizations_have_density_zero():
    log_joint = LogJoint(cholesky)
    u = torch.tensor([[0.5], [3.0], [-0.2], [0.1], [-7.0]], dtype=torch.float64)
    value, gradient = log_joint.value_and_gradient(u)
    assert value.isfinite().tolist() == [True, False, True, True, False]
    torch.testing.assert_close(value[[0, 2, 3]], log_joint(u[[0, 2, 3]]))
    assert gradient.isfinite().all()
    assert (gradient[[1, 4]] == 0).all()


def test_particles_that_raise_have_density_zero():
    def picky():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 0.1))
        if bool((z > 1).any()):
            raise ValueError("z is too large")
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0])

    log_joint = LogJoint(picky)
    u = torch.tensor([[0.5], [3.0], [-0.2], [0.1], [7.0]], dtype=torch.float64)
    value, gradient = log_joint.value_and_gradient(u)
    assert value.isfinite().tolist() == [True, False, True, True, False]
    torch.testing.assert_close(value[[0, 2, 3]], log_joint(u[[0, 2, 3]]))
    assert (gradient[[1, 4]] == 0).all()
    assert log_joint.num_raised == 2
    with pytest.raises(ValueError, match=r"more than half of 8 particles, first .* z is too large"):
        log_joint(torch.full((8, 1), 3.0, dtype=torch.float64))


def test_subsampled_plates():
    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 5.0))
        with pyro.plate("data", 7, subsample_size=3) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[index])

    log_joint = LogJoint(model)
    assert log_joint.is_stochastic
    u = torch.full((4000, 1), 0.3, dtype=torch.float64)
    assert log_joint(u[:50]).unique().numel() == 1  # one subsample a call
    many = torch.stack([log_joint(u[:1])[0] for _ in range(400)])
    full = dist.Normal(0.3, 1.0).log_prob(Y).sum() + dist.Normal(0.0, 5.0).log_prob(u[0, 0])
    assert abs(many.mean() - full) < 4 * many.std() / 20
