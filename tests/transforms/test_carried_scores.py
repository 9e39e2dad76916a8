"""Scores carried along the forward pass, against the gradient of the density at fixed parameters."""

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import (
    Autoregressive,
    ComposeFlow,
    ElementwiseAffine,
    RationalQuadratic,
    SinhArcsinh,
    Whitening,
    iaf,
    planar,
)

D = 5


def flows():
    scale_tril = torch.eye(D) + 0.3 * torch.randn(D, D).tril(-1)
    return {
        "affine": Autoregressive(D),
        "spline": Autoregressive(D, transformer=RationalQuadratic()),
        "elementwise": ElementwiseAffine(D),
        "sinh-arcsinh": SinhArcsinh(D),
        "whitening": Whitening(torch.randn(D), scale_tril),
        "planar": planar(D),
        "chain": ComposeFlow(
            [
                iaf(D, num_layers=2),
                SinhArcsinh(D),
                ElementwiseAffine(D),
                Whitening(torch.zeros(D), scale_tril),
            ]
        ),
    }


@pytest.mark.parametrize("name", list(flows()))
def test_score_is_the_gradient_of_the_density(name):
    flow = perturb(flows()[name].double())
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    base = dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)
    (score,) = torch.autograd.grad(base.log_prob(x).sum(), x)
    y, ladj, carried = flow.forward_and_score(x, score)
    expected_y, expected_ladj = flow.forward_and_ladj(x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(ladj, expected_ladj)
    z = y.detach().requires_grad_()
    back, inverse_ladj = flow.inverse_and_ladj(z)
    (gradient,) = torch.autograd.grad((base.log_prob(back) + inverse_ladj).sum(), z)
    torch.testing.assert_close(carried, gradient, rtol=1e-6, atol=1e-6)
    assert not carried.requires_grad
