"""Gradients of `ImportanceWeightedELBO`: against formulas written out, in their mean, and in their noise."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import nn
from weighted_models import X, log_normal

from pyro_flows_ext.guides import AutoFlow
from pyro_flows_ext.infer import ImportanceWeightedELBO
from pyro_flows_ext.infer.elbo import path_gradients
from pyro_flows_ext.transforms import FlowTransform, iaf, maf, realnvp, spline_autoregressive

# q(z | x) = N(a x + b, s); the posterior has 0.5, 0 and 0.5 ** 0.5.
START = {"a": 0.2, "b": 0.1, "log_s": 0.2}
POSTERIOR = {"a": 0.5, "b": 0.0, "log_s": 0.5 * torch.tensor(0.5).log().item()}


def elbo_of(num_particles, gradient, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message='gradient="stl" is biased')
        return ImportanceWeightedELBO(
            num_particles, gradient, **{"max_plate_nesting": 1, **options}
        )


class Noise:
    """Standard normal draws from a table `(sites, K, *)`: a site's K at once, or particle by particle."""

    def __init__(self, table):
        self.table, self.calls = table, 0

    def __call__(self, shape, dtype, device):
        sites, num_particles = self.table.shape[:2]
        call, self.calls = self.calls, self.calls + 1
        if tuple(shape) == tuple(self.table.shape[1:]):
            return self.table[call]
        return self.table[call % sites, call // sites % num_particles]

    def use(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr("torch.distributions.normal._standard_normal", self)


def model(x):
    theta = pyro.param("theta", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + theta, 1.0), obs=x)


def sample_z(x, a, b, s):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x + b, s))


def in_the_store(start):
    def guide(x):
        a = pyro.param("a", torch.tensor(start["a"]))
        b = pyro.param("b", torch.tensor(start["b"]))
        s = torch.tensor(start["log_s"]).exp()
        sample_z(x, a, b, pyro.param("s", s, constraint=constraints.positive))

    return guide


def in_a_module(start):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in start.items():
                self.register_parameter(name, nn.Parameter(torch.tensor(value)))

    net = Net()

    def guide(x):
        pyro.module("net", net)
        sample_z(x, net.a, net.b, net.log_s.exp())

    return guide


def in_a_pyro_module(start):
    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(start["a"]))
            self.b = PyroParam(torch.tensor(start["b"]))
            self.s = PyroParam(torch.tensor(start["log_s"]).exp(), constraints.positive)

        def forward(self, x):
            sample_z(x, self.a, self.b, self.s)

    return Guide()


GUIDES = {"store": in_the_store, "module": in_a_module, "pyro-module": in_a_pyro_module}


def gradients(elbo, model, guide, *args):
    """Loss and gradients by unconstrained parameter, last part of its name."""
    store = pyro.get_param_store()
    for _, p in store.named_parameters():
        p.grad = None
    loss = elbo.loss_and_grads(model, guide, *args)
    grads = {}
    for name, p in store.named_parameters():
        grads[name.split("$$$")[-1].split(".")[-1]] = (
            torch.zeros(()) if p.grad is None else p.grad.clone()
        )
    return loss, grads


def expected(eps, gradient):
    """Loss and gradients written out, for `model` and the guides at `START`."""
    power = {"stl": 1, "dreg": 2}.get(gradient)
    a, b, log_s, theta = (
        torch.tensor(value, requires_grad=True) for value in (*START.values(), 0.3)
    )
    z = a * X + b + log_s.exp() * eps
    loc, scale = a * X + b, log_s.exp()
    log_q = (
        log_normal(z, loc, scale) if power is None else log_normal(z, loc.detach(), scale.detach())
    )
    log_w = log_normal(z, 0.0) + log_normal(X, z + theta) - log_q
    w = log_w.detach().softmax(0)
    loss = -(log_w.logsumexp(0) - torch.tensor(float(len(eps))).log()).sum()
    (d_theta,) = torch.autograd.grad(-(w * log_w).sum(), theta, retain_graph=True)
    grads = torch.autograd.grad(-(w ** (power or 1) * log_w).sum(), (a, b, log_s))
    return loss.item(), dict(zip(("a", "b", "s", "theta"), (*grads, d_theta), strict=True))


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "loop"])
@pytest.mark.parametrize("gradient", ["iwae", "stl", "dreg"])
@pytest.mark.parametrize("where", GUIDES)
def test_gradients_by_hand_wherever_the_parameters_are(monkeypatch, where, gradient, at_once):
    eps = torch.randn(4, 6)
    Noise(eps.unsqueeze(0)).use(monkeypatch)
    elbo = elbo_of(4, gradient, vectorize_particles=at_once)
    loss, grads = gradients(elbo, model, GUIDES[where](START), X)
    loss_by_hand, by_hand = expected(eps, gradient)
    assert loss == pytest.approx(loss_by_hand, rel=1e-5)
    grads["s"] = grads.pop("log_s", grads.get("s"))
    assert grads.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "loop"])
@pytest.mark.parametrize("num_particles", [1, 4], ids=["K=1", "K=4"])
@pytest.mark.parametrize("gradient", ["iwae", "stl", "dreg"])
def test_several_bounds_are_averaged(monkeypatch, gradient, num_particles, at_once):
    eps = torch.randn(3, num_particles, 6)
    single = [expected(e, gradient) for e in eps]
    Noise(eps.reshape(1, -1, 6)).use(monkeypatch)
    elbo = elbo_of(num_particles, gradient, num_bounds=3, vectorize_particles=at_once)
    loss, grads = gradients(elbo, model, in_the_store(START), X)
    assert loss == pytest.approx(sum(value for value, _ in single) / 3, rel=1e-5)
    assert grads.keys() == single[0][1].keys()
    for name, grad in grads.items():
        by_hand = torch.stack([by_name[name] for _, by_name in single]).mean(0)
        torch.testing.assert_close(grad, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [True, False], ids=["at-once", "loop"])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_draws_that_depend_on_draws(monkeypatch, gradient, at_once):
    """q(u) q(v | u) q(z | u, v): the gradient goes back through all of them, once."""
    start = torch.tensor([0.2, -0.1, 0.7, -0.3, 0.4, 0.6])

    def chain(x, p):
        with pyro.plate("data", 6):
            u = pyro.sample("u", dist.Normal(p[0] * x, p[1].exp()))
            v = pyro.sample("v", dist.Normal(p[2] * u, p[3].exp()))
            pyro.sample("z", dist.Normal(p[4] * u + p[5] * v, 0.8))

    def joint(x):
        with pyro.plate("data", 6):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            v = pyro.sample("v", dist.Normal(u, 1.0))
            z = pyro.sample("z", dist.Normal(v, 1.0))
            pyro.sample("x", dist.Normal(z + u, 1.0), obs=x)

    eps = torch.randn(3, 5, 6)
    Noise(eps).use(monkeypatch)
    elbo = elbo_of(5, gradient, vectorize_particles=at_once)
    _, grads = gradients(elbo, joint, lambda x: chain(x, pyro.param("p", start)), X)

    p = start.clone().requires_grad_()
    f = start  # the same, held fixed
    u = p[0] * X + p[1].exp() * eps[0]
    v = p[2] * u + p[3].exp() * eps[1]
    z = p[4] * u + p[5] * v + 0.8 * eps[2]
    log_q = log_normal(u, f[0] * X, f[1].exp()) + log_normal(v, f[2] * u, f[3].exp())
    log_q = log_q + log_normal(z, f[4] * u + f[5] * v, 0.8)
    log_p = log_normal(u, 0.0) + log_normal(v, u) + log_normal(z, v) + log_normal(X, z + u)
    log_w = log_p - log_q
    w = log_w.detach().softmax(0) ** (2 if gradient == "dreg" else 1)
    (by_hand,) = torch.autograd.grad(-(w * log_w).sum(), p)
    torch.testing.assert_close(grads["p"], by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_the_reverse_model_and_the_model_keep_their_gradient(gradient):
    def guide(x):
        q, r = pyro.param("q", torch.tensor(0.5)), pyro.param("r", torch.tensor(0.4))
        with pyro.plate("data", 6):
            u = pyro.sample("u", dist.Normal(q, 1.0), infer={"is_auxiliary": True})
            z = pyro.sample("z", dist.Normal(q * u, 0.8))
            pyro.factor("reverse", -dist.Normal(r * z, 0.9).log_prob(u), has_rsample=True)

    grads = {}
    for name in ("iwae", gradient):
        pyro.set_rng_seed(2)
        _, grads[name] = gradients(elbo_of(5, name), model, guide, X)
    for name in ("r", "theta"):
        torch.testing.assert_close(grads[gradient][name], grads["iwae"][name])
        assert grads["iwae"][name].abs() > 0.01
    assert (grads[gradient]["q"] - grads["iwae"]["q"]).abs() > 0.01


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_a_map_of_fixed_noise_keeps_its_gradient(gradient):
    """Parameters of a `Delta` are in no density of a draw: there is nothing to leave out."""

    def guide(x):
        a, s = pyro.param("a", torch.tensor(0.5)), pyro.param("s", torch.tensor(0.7))
        with pyro.plate("data", 6):
            eps = pyro.sample("eps", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(a * x + s * eps, log_density=-s.log()))

    grads = []
    for name in ("iwae", gradient):
        pyro.set_rng_seed(2)
        grads.append(gradients(elbo_of(3, name), model, guide, X)[1])
    torch.testing.assert_close(grads[0], grads[1])


def walk():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.cumsum(-1), 0.5).to_event(1), obs=torch.ones(3))


FLOWS = {
    "sylvester": "sylvester",
    "planar": "planar",
    "radial": "radial",
    "iaf": lambda D: iaf(D),
    "spline-iaf": lambda D: spline_autoregressive(D, [8]),
    "realnvp": lambda D: realnvp(D, num_layers=2),
    "maf": lambda D: maf(D, num_layers=2),
}


def flow_guide(flow):
    guide = AutoFlow(walk, flow, init_scale=0.5)
    guide.setup()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return guide.double()


def flow_gradient(guide, gradient):
    for p in guide.parameters():
        p.grad = None
    pyro.set_rng_seed(5)
    elbo_of(6, gradient, max_plate_nesting=0).loss_and_grads(walk, guide)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in guide.parameters()]


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("flow", FLOWS)
def test_path_gradients_of_flows(flow, gradient):
    guide = flow_guide(FLOWS[flow])
    frozen = copy.deepcopy(guide).requires_grad_(False)
    grads = flow_gradient(guide, gradient)
    pyro.set_rng_seed(5)
    z = guide.get_posterior().rsample((6,))
    log_p = log_normal(z, 0.0).sum(-1) + log_normal(1.0, z.cumsum(-1), 0.5).sum(-1)
    log_w = log_p - frozen.get_posterior().log_prob(z)  # a second pass, the other way
    w = log_w.detach().softmax(0) ** (2 if gradient == "dreg" else 1)
    by_hand = torch.autograd.grad(-(w * log_w).sum(), list(guide.parameters()), allow_unused=True)
    for p, grad, other in zip(guide.parameters(), grads, by_hand, strict=True):
        other = torch.zeros_like(p) if other is None else other
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-7)
    assert max(grad.abs().max() for grad in grads) > 0.1


@pytest.mark.parametrize("flow", ["sylvester", "planar", "iaf", "spline-iaf"])
def test_flows_that_draw_fast_are_not_inverted(monkeypatch, flow):
    guide = flow_guide(FLOWS[flow])
    by_inverse = pytest.MonkeyPatch()
    by_inverse.setattr(path_gradients, "MAX_JACOBIAN_DIM", 2)
    expected = flow_gradient(guide, "dreg")
    by_inverse.undo()

    def refuse(self, y):
        raise AssertionError("inverted")

    for kind in {type(m) for m in guide.modules() if isinstance(m, FlowTransform)}:
        monkeypatch.setattr(kind, "inverse_and_ladj", refuse)
    torch.testing.assert_close(flow_gradient(guide, "dreg"), expected, rtol=1e-5, atol=1e-7)


def repeated(elbo, start, x, num_calls):
    """Gradients `(num_calls, 4)` of a, b, s and theta."""
    guide = in_the_store(start)
    pyro.clear_param_store()
    grads = [gradients(elbo, model, guide, x)[1] for _ in range(num_calls)]
    return torch.stack([torch.stack([g[n] for n in ("a", "b", "s", "theta")]) for g in grads])


def test_dreg_is_unbiased_and_stl_is_not():
    x = X.repeat(170)  # 98 calls: 100,000 sets of particles
    grads = {name: repeated(elbo_of(4, name), START, x, 98) for name in ("iwae", "stl", "dreg")}
    mean = {name: g.mean(0) for name, g in grads.items()}
    var = {name: g.var(0) / len(g) for name, g in grads.items()}
    se = (var["iwae"] + var["dreg"]).sqrt()
    assert ((mean["iwae"] - mean["dreg"]).abs() < 4 * se).all()
    assert (mean["iwae"].abs() > 5 * se).all()
    bias = (mean["iwae"] - mean["stl"])[:3].abs()
    assert (bias > 10 * (var["iwae"] + var["stl"]).sqrt()[:3]).any()


@pytest.mark.parametrize("num_particles", [1, 5])
def test_no_noise_is_left_at_the_posterior(num_particles):
    sd = {}
    for name in ("iwae", "stl", "dreg"):
        pyro.clear_param_store()
        pyro.param("theta", torch.tensor(0.0))
        guide = in_the_store(POSTERIOR)
        calls = [gradients(elbo_of(num_particles, name), model, guide, X)[1] for _ in range(30)]
        sd[name] = torch.stack([torch.stack([g["a"], g["b"], g["s"]]) for g in calls]).std(0)
    assert (sd["iwae"] > 0.3).all()
    assert (sd["stl"] < 1e-5).all()
    assert (sd["dreg"] < 1e-5).all()


@pytest.mark.slow
def test_the_signal_of_dreg_does_not_drown():
    ratios = {}
    for name in ("iwae", "dreg"):
        for num_particles in (5, 20, 80):
            grads = repeated(elbo_of(num_particles, name), START, X.repeat(10), 150)[:, :3]
            ratios[name, num_particles] = grads.mean(0).norm() / grads.std(0).norm()
    for num_particles in (5, 20, 80):
        assert ratios["dreg", num_particles] > 1.5 * ratios["iwae", num_particles]
    assert ratios["iwae", 80] < 0.7 * ratios["iwae", 5]
    assert ratios["dreg", 80] > 0.9 * ratios["dreg", 5]
