"""The path gradient of `fit`: parameters of the model, and particles of density zero."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.guides import AutoIAF
from pyro_flows_ext.infer.elbo.path_gradients import draw_with_density
from pyro_flows_ext.infer.training.objectives import PathObjective
from pyro_flows_ext.programs import LogJoint

NUM = 400


def zero():
    return torch.zeros((), dtype=torch.float64)


def objective_of(model):
    guide = AutoIAF(model, init_scale=1.0)
    guide()
    return PathObjective(LogJoint(model, latents=guide.latents), guide, NUM), guide


def test_parameters_of_the_model_have_the_gradient_of_the_bound():
    def model():
        theta = pyro.param("theta", zero() + 0.3)
        z = pyro.sample("z", dist.Normal(zero(), 1.0))
        pyro.factor("f", theta.square() * z)

    objective, guide = objective_of(model)
    torch.manual_seed(1)
    base = guide.get_base_dist().expand(torch.Size([NUM]))
    _, z, _ = draw_with_density(dist.TransformedDistribution(base, [guide.get_transform()]))
    torch.manual_seed(1)
    loss, params = objective()
    (theta,) = (p for name, p in pyro.get_param_store().named_parameters() if name == "theta")
    assert any(p is theta for p in params)
    assert math.isfinite(loss)
    torch.testing.assert_close(theta.grad, -0.6 * z.detach().mean())


def test_particles_of_density_zero_are_left_out_of_all_gradients():
    def model():
        theta = pyro.param("theta", zero())
        z = pyro.sample("z", dist.Normal(zero(), 1.0))
        pyro.factor("f", torch.where(z > -0.5, theta, -torch.inf))

    objective, _ = objective_of(model)
    torch.manual_seed(1)
    loss, _ = objective()
    assert math.isfinite(loss)
    (theta,) = (p for name, p in pyro.get_param_store().named_parameters() if name == "theta")
    assert theta.grad.item() == pytest.approx(-1.0)
