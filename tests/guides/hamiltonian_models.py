"""Models and Hamiltonian guides for them, with parameters in general position or with a closed form."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam

from pyro_flows_ext.guides import AutoHamiltonian
from pyro_flows_ext.testing import perturb

Y = torch.tensor([1.2, -0.4, 0.3], dtype=torch.float64)
SHAPES = {"mu": (), "tau": (), "theta": (3,)}


def model(y=Y):
    """A global latent on the line, a positive one, and one in a plate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 2.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=y.dtype), 0.5))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def perturbed(num_layers=2, scale=0.3, program=model, args=(Y,), **options):
    """A guide whose parameters are anywhere."""
    guide = AutoHamiltonian(program, num_layers, **{"step_size": 0.3, "init_scale": 0.5, **options})
    guide.setup(*args)
    perturb(guide.transform, scale=scale)
    return guide


# Two correlated coefficients behind one observation: log p(x) and the posterior are known.
PRIOR = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)
DESIGN = torch.tensor([1.0, -2.0], dtype=torch.float64)
NOISE, X = 0.4, 1.5
LOG_EVIDENCE = (
    dist.Normal(0.0, (DESIGN @ PRIOR @ DESIGN + NOISE**2).sqrt()).log_prob(torch.tensor(X)).item()
)


def linear_gaussian():
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), PRIOR))
    mean = (z * DESIGN).sum(-1)
    pyro.sample("x", dist.Normal(mean, NOISE), obs=torch.tensor(X, dtype=torch.float64))


def closed_form(guide):
    """E_q [log p(x, z) + log r(ρ | z)] + H(q) for a linear flow and a linear r of constant scale, by matrices."""
    flow, D = guide.transform, 2
    precision = PRIOR.inverse() + DESIGN.outer(DESIGN) / NOISE**2
    slope = DESIGN * X / NOISE**2
    loc, L = flow.whitening.loc, flow.whitening.scale_tril
    step, mass = flow.leapfrog.step_size, flow.leapfrog.mass
    I, O = torch.eye(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)

    def block(a, b, c, d):
        return torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)])

    # ∇U(z) = Lᵀ (precision (loc + L z) - slope) = H z + g
    H, g = L.mT @ precision @ L, L.mT @ (precision @ loc - slope)
    mean = torch.cat([flow.start.loc, torch.zeros(D, dtype=torch.float64)])
    scale = torch.cat([flow.start.log_scale.exp(), flow.leapfrog.momentum_scale])
    A, b = scale.diag(), mean
    for eps, alpha in zip(step, tempers(flow.leapfrog), strict=True):
        half = eps / 2
        kick, kick_b = block(I, O, -half[:, None] * H, I), torch.cat([0 * g, -half * g])
        drift = block(I, (eps / mass).diag(), O, I)
        shrink = block(I, O, O, alpha * I)
        for M, shift in ((kick, kick_b), (drift, 0 * b), (kick, kick_b), (shrink, 0 * b)):
            A, b = M @ A, M @ b + shift
    place = block(L, O, O, I)
    A, b = place @ A, place @ b + torch.cat([loc, 0 * loc])
    cov = A @ A.mT
    entropy = dist.MultivariateNormal(b, cov).entropy()

    def expected_normal(rows, offset, V):
        """E log N(rows @ (z, ρ) + offset; 0, V)."""
        m, C = rows @ b + offset, rows @ cov @ rows.mT
        return dist.MultivariateNormal(torch.zeros_like(m), V).log_prob(m) - 0.5 * torch.trace(
            V.inverse() @ C
        )

    one = torch.ones(1, 1, dtype=torch.float64)
    left, right = torch.cat([I, O], 1), torch.cat([O, I], 1)
    total = entropy + expected_normal(left, torch.zeros(D, dtype=torch.float64), PRIOR)
    total = total + expected_normal(
        (DESIGN @ left)[None], torch.tensor([-X], dtype=torch.float64), NOISE**2 * one
    )
    # ρ / √mass is normal around W L⁻¹(y - loc) + c, with a scale of its own.
    net = flow.reverse_net[0]
    root = mass.sqrt()
    W, c = root[:, None] * net.weight[:D], root * net.bias[:D]
    spread = root * (math.log(1000) * (net.bias[D:] / math.log(1000)).tanh()).exp()
    W = W @ L.inverse()
    return total + expected_normal(right - W @ left, W @ loc - c, spread.square().diag())


def linear_guide(num_layers, **options):
    """A guide for `linear_gaussian` whose r has a constant scale: everything is normal."""
    guide = perturbed(
        num_layers, program=linear_gaussian, args=(), reverse_hidden_dims=(), **options
    )
    with torch.no_grad():
        guide.transform.reverse_net[0].weight[2:].zero_()
        guide.whiten(torch.tensor([0.3, -0.2]), torch.tensor([[0.6, 0.0], [0.2, 0.4]]))
    return guide


def tempers(leapfrog):
    if not leapfrog.tempering:
        return torch.ones(leapfrog.num_layers, dtype=torch.float64)
    return leapfrog._log_alpha().exp()


class Empirical(PyroModule):
    """Parameters in both ways, in prior and likelihood."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.noise = PyroParam(torch.tensor(0.7, dtype=torch.float64), dist.constraints.positive)

    def forward(self, y=Y):
        width = pyro.param(
            "width", torch.tensor(1.3, dtype=torch.float64), dist.constraints.positive
        )
        z = pyro.sample("z", dist.Normal(self.loc, width))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z.sin(), self.noise), obs=y)
