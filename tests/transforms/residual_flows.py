"""Residual flows whose Jacobians are near the bound, for the tests of their log-dets."""

import itertools

import torch

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import LogDetNoise, ResidualFlow

D = 3


def made(*args, scale=0.3, train=False, **options):
    """At weights that make terms of high order count."""
    args = args or (D, (8, 8))
    transform = perturb(ResidualFlow(*args, **options).double(), scale=scale)
    # Aligned with each other, as random layers are not: their Jacobian is then near the bound.
    if len(transform.event_shape) == 1 and options.get("net") is None:
        with torch.no_grad():
            for layer in transform.net.layers:
                layer.weight.add_(3 * torch.eye(*layer.weight.shape))
    return transform.train(train)


def normal(*batch):
    return torch.randn(*batch, D, dtype=torch.float64)


def jacobian_norm(transform, x):
    g = transform.net.bind()
    return torch.linalg.matrix_norm(torch.func.vmap(torch.func.jacrev(g))(x), 2).max()


def all_signs():
    """Every Rademacher vector `(2ᴰ, D)`: their mean is the expectation over probes."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D)), dtype=torch.float64)


def exact_noise(num_terms=300):
    return LogDetNoise(all_signs(), (1.0,) * num_terms)


def ladj_of(transform, inverse=False):
    return lambda x: (transform.inverse_and_ladj if inverse else transform.forward_and_ladj)(x)[1]


def made_exact(transform):
    """The same transform with its exact log-det."""
    exact = transform._view(transform.batch_shape, *transform.__dict__.get("_bound", ()))
    exact.__dict__.update(exact_log_det=True, noise=None)
    return exact


def leaves_of(transform, *tensors):
    return [*tensors, *transform.parameters()]
