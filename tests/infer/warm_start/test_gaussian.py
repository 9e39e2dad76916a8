"""Gaussians with dense and low-rank scales: the same distribution by either."""

import pytest
import torch
from closed_forms import normal

from pyro_flows_ext.infer.warm_start import DenseGaussian, LowRankGaussian


def low_rank(dim=6, rank=2, dtype=torch.float64):
    basis = torch.linalg.qr(torch.randn(dim, rank, dtype=dtype))[0]
    stretch = torch.tensor([8.0, -0.9], dtype=dtype)[:rank]
    return LowRankGaussian(
        torch.randn(dim, dtype=dtype), torch.rand(dim, dtype=dtype) + 0.5, basis, stretch
    )


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_low_rank_is_the_dense_gaussian_of_the_same_covariance(rank):
    q = low_rank(rank=rank)
    S, Q = q.diagonal.diag(), q.basis
    covariance = S @ (torch.eye(6) + Q @ q.stretch.diag() @ Q.mT) @ S
    torch.testing.assert_close(q.scale_tril @ q.scale_tril.mT, covariance)
    assert (q.scale_tril.diagonal() > 0).all()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(q.loc, covariance).log_prob(x)
    torch.testing.assert_close(q.log_prob(x), expected)
    torch.testing.assert_close(DenseGaussian(q.loc, q.scale_tril).log_prob(x), expected)


@pytest.mark.parametrize("kind", ["dense", "low-rank"])
def test_scale_unscale_and_pull_back(kind):
    q = low_rank()
    if kind == "dense":
        q = DenseGaussian(q.loc, q.scale_tril)
    noise = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(q.unscale(q.scale(noise)), noise)
    A = torch.autograd.functional.jacobian(q.scale, noise[0, 0])
    torch.testing.assert_close(A @ A.mT, q.scale_tril @ q.scale_tril.mT)
    torch.testing.assert_close(q.log_det, torch.linalg.slogdet(A)[1])
    torch.testing.assert_close(q.pull_back(noise), noise @ A)
    torch.testing.assert_close(q.log_prob(q.draw(noise)), q.log_prob_of(noise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_changed(dtype):
    q = low_rank(dtype=dtype)
    assert q.draw(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    assert q.scale_tril.dtype == dtype
    assert q.to(q.loc.double()).draw(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64


def test_elbo_of_the_exact_posterior_is_the_evidence():
    """Without any noise: log p - log q is constant."""
    q = low_rank()
    noise = torch.randn(2, 6, dtype=torch.float64)
    assert q.elbo(normal(q.loc, q.scale_tril), noise) == pytest.approx(0.0, abs=1e-8)


def test_elbo_without_density_at_a_draw():
    q = LowRankGaussian.isotropic(torch.zeros(1))
    noise = torch.tensor([[0.0], [5.0]])
    assert q.elbo(lambda u: torch.where(u[:, 0] > 3, -torch.inf, 0.0), noise) == -float("inf")
