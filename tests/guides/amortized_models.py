"""Models with latents of a plate, and guides for them at parameters of no particular kind."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

from pyro_flows_ext.guides import AutoAmortizedFlow

W = torch.tensor([[1.0, 0.8], [0.0, 1.0], [0.5, -0.2]])
NOISE = 0.6
FLOWS = {
    "planar": "planar",
    "sylvester": "sylvester",
    "iaf": "iaf",
    "realnvp": "realnvp",
    "gaussian": None,
}


def linear(x, size=None, index=None):
    """z_n ~ N(0, I), x_n ~ N(W z_n, .36 I): all data, a subsample that is drawn, or one that is given."""
    with pyro.plate("data", len(x), subsample_size=size, subsample=index) as chosen:
        loc = x.new_zeros(2)
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        x = x if chosen is None else x[chosen]
        pyro.sample("x", dist.Normal(z @ W.to(x).mT, NOISE).to_event(1), obs=x)


def simulate(num, dtype=torch.float32):
    z = torch.randn(num, 2, dtype=dtype)
    return z @ W.to(dtype).mT + NOISE * torch.randn(num, 3, dtype=dtype)


def closed_form(x):
    """Of `linear`: posterior means `(N, 2)` and sds `(2)`, and log p(x_n) `(N)`."""
    A = W.to(x)
    covariance = torch.linalg.inv(torch.eye(2).to(x) + A.mT @ A / NOISE**2)
    marginal = A @ A.mT + NOISE**2 * torch.eye(3).to(x)
    evidence = dist.MultivariateNormal(x.new_zeros(3), marginal).log_prob(x)
    return x @ A @ covariance / NOISE**2, covariance.diagonal().sqrt(), evidence


def several(x, size=None):
    """Four latents a datum, of four supports, two of them in a plate within the datum."""
    with pyro.plate("data", len(x), subsample_size=size, dim=-2) as index:
        tau = pyro.sample("tau", dist.LogNormal(x.new_zeros(()), 0.5))
        p = pyro.sample("p", dist.Dirichlet(x.new_ones(3)))
        with pyro.plate("parts", 4, dim=-1):
            u = pyro.sample("u", dist.Uniform(x.new_tensor(-1.0), 2.0))
            v = pyro.sample("v", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = u + v.sum(-1) + p[..., 0]
            obs = x[:, :1] if index is None else x[index, :1]
            pyro.sample("x", dist.Normal(loc, tau), obs=obs.expand(-1, 4))


SITES = {"tau": (1,), "p": (1, 3), "u": (4,), "v": (4, 2)}


def encoder(in_dim=3, dtype=torch.float32):
    return nn.Sequential(nn.Linear(in_dim, 8), nn.Tanh()).to(dtype)


def perturbed(model, *args, dtype=torch.float64, **options):
    """A guide that is set up on `args`, at parameters off their start, so that every datum has a posterior of its own."""
    guide = AutoAmortizedFlow(model, encoder(dtype=dtype), **options)
    guide.setup(*args)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.3 * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5 if p.dim() else 0.0)
    return guide


# --- continuously indexed ---

CIF = {"flow": "cif", "hidden_dims": (16,)}
LATENT, REVERSE = "_AutoAmortizedFlow_latent", "_AutoAmortizedFlow_r"


def terms(trace):
    """log q(z_n, u_n) and log r(u_n | z_n) by datum."""
    trace.compute_log_prob()
    sites = [trace.nodes[name] for name in (LATENT, REVERSE)]
    assert all("data" in {f.name for f in site["cond_indep_stack"]} for site in sites)
    assert all(site["infer"]["is_auxiliary"] for site in sites)
    return sites[0]["unscaled_log_prob"], -sites[1]["unscaled_log_prob"]


def at(guide, value, x, **kwargs):
    """A trace of the guide at latents and indices that no pass has drawn."""
    return poutine.trace(poutine.condition(guide, {LATENT: value})).get_trace(x, **kwargs)
