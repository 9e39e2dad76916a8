"""Distributions fitted to each datum: their densities, and when a fit ends."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.diagnostics.local_density import LocalDensity
from pyro_flows_ext.diagnostics.local_fit import (
    LocalFlow,
    LocalGaussian,
    full_rank_planar,
    log_weights,
    maximise,
)
from pyro_flows_ext.transforms import iaf, realnvp

LOC = torch.tensor([[0.5, -1.0], [3.0, 0.0], [-2.0, 1.0]], dtype=torch.float64)
SCALE = torch.tensor([[1.0, 0.3], [0.2, 2.0], [0.5, 0.5]], dtype=torch.float64)


def model():
    """p(z_n) = N(LOC_n, diag SCALE_n²): a bound of 0 at the best."""
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(LOC, SCALE).to_event(1))


def start():
    return LocalGaussian(torch.zeros_like(LOC), torch.ones_like(SCALE))


@pytest.mark.parametrize(
    "flow",
    [full_rank_planar, lambda dim: realnvp(dim, hidden_dims=(4,)), lambda dim: iaf(dim)],
    ids=["planar", "realnvp", "iaf"],
)
def test_each_datum_has_a_flow_of_its_own(flow):
    gaussian = LocalGaussian(LOC, SCALE)
    transform = flow(2)
    q = LocalFlow(transform, gaussian)
    with torch.no_grad():
        for p in q.parameters:
            p.add_(0.3 * torch.randn_like(p))
    u, log_q = q.draw(5)
    assert u.shape == (5, 3, 2)
    shift, log_scale, *thetas = q.parameters
    for n in range(3):  # through the inverse of the n-th copy
        with torch.no_grad():
            for p, theta in zip(transform.parameters(), thetas, strict=True):
                p.copy_(theta[n])
        v = (u[:, n] - LOC[n] - SCALE[n] * shift[n]) / log_scale[n].exp()
        noise, ladj = transform.inverse_and_ladj(v)
        expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) + ladj - log_scale[n].sum()
        torch.testing.assert_close(log_q[:, n], expected)


def test_a_flow_begins_where_its_gaussian_is():
    q = LocalFlow(iaf(2), LocalGaussian(LOC, SCALE))
    u, log_q = q.draw(4000)
    torch.testing.assert_close(log_q, dist.Normal(LOC, SCALE).log_prob(u).sum(-1))
    torch.testing.assert_close(u.std(0), SCALE, rtol=0.06, atol=0.0)


def test_a_gaussian_finds_gaussians_and_stops():
    density, q = LocalDensity(model, plates=("data",)), start()
    fit = maximise(density, q, num_particles=8, max_steps=2000)
    assert fit.converged
    assert fit.steps < 2000
    torch.testing.assert_close(q.loc.detach(), LOC, rtol=0.0, atol=0.02)
    torch.testing.assert_close(q.scale.detach(), SCALE, rtol=0.02, atol=0.0)
    log_w = log_weights(density, q.draw, 70, chunk_size=32)
    assert log_w.shape == (70, 3)
    assert log_w.dtype == torch.float64
    assert log_w.abs().max() < 0.2


@pytest.mark.parametrize("max_steps", [1, 30, 150])
def test_a_fit_that_has_to_end(max_steps):
    fit = maximise(LocalDensity(model, plates=("data",)), start(), 4, max_steps)
    assert fit == (max_steps, False)


def test_particles_without_density_are_left_out():
    def walled():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(LOC, SCALE).to_event(1))
            pyro.factor(
                "wall", torch.where(z[..., 0] > LOC[:, 0] + 4 * SCALE[:, 0], torch.nan, 0.0)
            )

    q = LocalGaussian(LOC + 4 * SCALE, SCALE)  # half of the draws are beyond the wall
    maximise(LocalDensity(walled, plates=("data",)), q, num_particles=16, max_steps=500)
    torch.testing.assert_close(q.loc.detach(), LOC, rtol=0.0, atol=0.1)
