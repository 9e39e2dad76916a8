"""Models and guides whose importance weights can be written down."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger

X = torch.tensor([0.5, 1.5, -0.2, 0.9, -1.3, 2.2])
G = torch.tensor([[0.5, 1.5, -0.2], [0.9, -1.3, 2.2]])  # two groups of three


def log_normal(value, loc, scale=1.0):
    return dist.Normal(loc, scale).log_prob(torch.as_tensor(value))


def log_mean_exp(log_w):
    return log_w.logsumexp(0) - math.log(len(log_w))


class Given(Messenger):
    """Latents from a table, name -> `(K, *shape)`, in place of draws.

    All K at once, left of `dims` plate dimensions; or with `dims=None` one row more in each run.
    """

    def __init__(self, values, dims):
        super().__init__()
        self.values, self.dims, self.run = values, dims, -1

    def __call__(self, guide):
        def run(*args, **kwargs):
            self.run += 1
            with self:
                return guide(*args, **kwargs)

        return run

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            if self.dims is None:
                msg["value"] = value[self.run]
            else:
                ones = (1,) * (self.dims + 1 - value.dim())
                msg["value"] = value.reshape(len(value), *ones, *value.shape[1:])


def local(x, size=None):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1): log p(x_n) = log N(x_n; 0, 2)."""
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def local_guide(x, size=None):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        pyro.sample("z", dist.Normal(0.3 * x[index], 0.9))


def nested(x=G):
    with pyro.plate("groups", 2, dim=-2):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def nested_guide(x=G):
    with pyro.plate("groups", 2, dim=-2):
        m = pyro.sample("m", dist.Normal(0.2, 1.1))
        with pyro.plate("items", 3, dim=-1):
            pyro.sample("z", dist.Normal(m, 0.7))


def subsampled(x=X):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=2) as index:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x[index])


def subsampled_guide(x=X):
    pyro.sample("mu", dist.Normal(0.1, 0.5))
