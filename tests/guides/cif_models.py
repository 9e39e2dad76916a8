"""Models and continuously indexed guides for them, with parameters in general position or with a closed form."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_value

from pyro_flows_ext.guides import AutoCIF
from pyro_flows_ext.guides.cif import IndexedLayer
from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import ElementwiseAffine, sylvester

Y = torch.tensor([1.2, -0.4, 0.3], dtype=torch.float64)
SHAPES = {"mu": (), "tau": (), "theta": (3,)}


def model(y=Y):
    """A global latent on the line, a positive one, and one in a plate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 2.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=y.dtype), 0.5))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def perturbed(*args, scale=0.7, **options):
    """A guide for `model` whose parameters are anywhere."""
    guide = AutoCIF(model, *args, **options)
    guide.setup(Y)
    perturb(guide.transform, scale=scale)
    return guide


def one_latent():
    pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))


def one_layer(transform=sylvester):
    guide = AutoCIF(one_latent, 1, transform, init_scale=0.5)
    guide.setup()
    torch.manual_seed(1)
    perturb(guide.transform, scale=0.5)
    return guide


def linear_gaussian(base_scale=1.5):
    """A layer of linear maps and the normal distribution of its latents; r is the exact q(u | z)."""
    D = 2
    layer = IndexedLayer(ElementwiseAffine(D), D, hidden_dims=()).double()
    S, c, d, alpha = (torch.randn(D, dtype=torch.float64) for _ in range(4))
    S, b, sigma = (0.3 * S).exp(), 0.4, torch.tensor(0.7, dtype=torch.float64)
    # a = S w + c u + d with u = αᵀ w + b + σ ε; f adds nothing.
    A = torch.cat([S.diag() + c[:, None] * alpha, sigma * c[:, None]], 1)  # of (w, ε)
    B = torch.cat([alpha, sigma[None]])[None]
    V = torch.diag(torch.tensor([base_scale**2] * D + [1.0], dtype=torch.float64))
    mean, cov = c * b + d, A @ V @ A.mT
    gain = torch.linalg.solve(cov, (B @ V @ A.mT).mT).mT
    rest = (B @ V @ B.mT - gain @ A @ V @ B.mT).squeeze()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.indexed.net[0].weight[:D, 0] = c
        layer.indexed.net[0].bias.copy_(torch.cat([d, raw_of(S.log())]))
        layer.index_net[0].weight[0] = alpha
        layer.index_net[0].bias.copy_(torch.stack([torch.tensor(b), raw_of(sigma.log())]))
        layer.reverse_net[0].weight[0] = gain
        layer.reverse_net[0].bias.copy_(torch.stack([b - (gain @ mean)[0], raw_of(rest.log() / 2)]))
    return layer, dist.MultivariateNormal(mean, cov)


def raw_of(log_scale):
    """What a network has to emit for this log-scale, c tanh(raw / c) with c = log 1000."""
    c = math.log(1000)
    return c * (log_scale / c).atanh()


def linear_guide():
    layer, posterior = linear_gaussian()

    def target():
        pyro.sample("z", posterior)

    guide = AutoCIF(
        target,
        1,
        ElementwiseAffine,
        base_scale=1.5,
        init_scale=1.0,
        index_hidden_dims=(),
        init_loc_fn=init_to_value(values={"z": torch.zeros(2, dtype=torch.float64)}),
    )
    guide.setup()
    guide.transform.layers[0].load_state_dict(layer.state_dict())
    return guide, target, posterior
