"""Continuously indexed flows to test, and the paper's formulas for them."""

import math

import pyro
import pyro.distributions as dist
import torch
from densities import normal
from pyro import poutine

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import ContinuouslyIndexedFlow
from pyro_flows_ext.nn import MLP
from pyro_flows_ext.testing import perturb

HIDDEN = (6,)
INNER = {
    "maf": lambda D: T.maf(D, num_layers=2, hidden_dims=HIDDEN),
    "realnvp": lambda D: T.realnvp(D, num_layers=2, hidden_dims=HIDDEN),
    "nsf": lambda D: T.nsf(D, num_layers=2, hidden_dims=HIDDEN, num_bins=4, linear=False),
    "residual": lambda D: [T.ResidualFlow(D, HIDDEN).eval() for _ in range(2)],
    "planar": lambda D: [T.planar(D), T.planar(D).inv],
}


def indexed(transforms, dim=2, index_dim=1, scale=0.4, base=None):
    base = normal(dim) if base is None else base
    density = ContinuouslyIndexedFlow(base, transforms, index_dim, (5,), HIDDEN)
    for layer in density.layers:  # indices that tell little, so that the weights have moments
        for net in (layer.index_net, layer.reverse_net):
            net.load_state_dict(MLP(dim, 2 * index_dim, HIDDEN, zero_last=True).state_dict())
    return perturb(density, scale=scale).double()


def one_layer(dim=2, scale=0.4):
    inner = T.affine_autoregressive(dim, HIDDEN) if dim > 1 else T.ElementwiseAffine(1)
    return indexed(inner, dim, scale=scale)


def points(*shape):
    return 1.5 * torch.randn(*shape, dtype=torch.float64)


def weights_by_hand(density, x, indices):
    """log p(x, u) and log q(u | x), layer by layer in the notation of the paper."""
    log_p, log_q, z = 0.0, 0.0, x
    for layer, u in zip(reversed(density.layers), reversed(indices), strict=True):
        a = layer.indexed.transform.inv(z)

        def normal_of(params):
            loc, raw = params.chunk(2, -1)
            c = math.log(1000)
            return dist.Normal(loc, (c * (raw / c).tanh()).exp()).to_event(1)

        log_q = log_q + normal_of(layer.reverse_net(a)).log_prob(u)
        previous, ladj = layer.indexed.condition(u).inverse_and_ladj(z)
        log_p = log_p + normal_of(layer.index_net(previous)).log_prob(u) + ladj
        z = previous
    return log_p + density.base.log_prob(z), log_q


def by_row(trace):
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site)


def check_sites(density, x, rows):
    """Model and guide at the same indices, by row, against the paper's formulas."""

    def program(run):
        with pyro.plate("data", rows):
            run("x", x)

    guide_trace = poutine.trace(program).get_trace(density.guide)
    indices = [guide_trace.nodes[f"x_u{l}"]["value"] for l in range(1, len(density.layers) + 1)]
    assert {u.shape for u in indices} == {(rows, density.index_dim)}
    model_trace = poutine.trace(poutine.replay(program, guide_trace)).get_trace(density.model)
    log_p, log_q = weights_by_hand(density, x, indices)
    torch.testing.assert_close(by_row(model_trace), log_p)
    torch.testing.assert_close(by_row(guide_trace), log_q)
