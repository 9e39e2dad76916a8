"""The affine transforms: exact values, exact densities, refused whitenings."""

import pyro.distributions as dist
import pytest
import torch

from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import ElementwiseAffine, Whitening


def test_elementwise_affine_starts_as_the_identity():
    x = torch.randn(5, 3)
    y, ladj = ElementwiseAffine(3).forward_and_ladj(x)
    assert torch.equal(y, x)
    assert torch.equal(ladj, torch.zeros(5))


def test_elementwise_affine_of_a_normal_is_a_normal():
    transform = perturb(ElementwiseAffine(3).double())
    zero = torch.zeros(3, dtype=torch.float64)
    density = dist.TransformedDistribution(dist.Normal(zero, 1.0).to_event(1), [transform])
    expected = dist.Normal(transform.loc, transform.log_scale.exp()).to_event(1)
    y = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(density.log_prob(y), expected.log_prob(y))


@pytest.mark.parametrize("log_scale", [-50.0, 50.0])
def test_elementwise_affine_at_extreme_scales(log_scale):
    transform = ElementwiseAffine(2).double()
    torch.nn.init.constant_(transform.log_scale, log_scale)
    x = torch.randn(5, 2, dtype=torch.float64)
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(transform.inverse_and_ladj(y)[0], x)
    assert torch.equal(ladj, torch.full((5,), 2 * log_scale, dtype=torch.float64))


def whitening(dim=3):
    scale_tril = torch.randn(dim, dim).tril(-1) + torch.diag(torch.rand(dim) + 0.5)
    return Whitening(torch.randn(dim).double(), scale_tril.double())


def test_whitening_of_a_normal_is_a_multivariate_normal():
    transform = whitening()
    zero = torch.zeros(3, dtype=torch.float64)
    density = dist.TransformedDistribution(dist.Normal(zero, 1.0).to_event(1), [transform])
    expected = dist.MultivariateNormal(transform.loc, scale_tril=transform.scale_tril)
    y = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(density.log_prob(y), expected.log_prob(y))


def test_whitening_has_buffers_and_no_parameters():
    transform = whitening()
    assert list(transform.parameters()) == []
    assert set(transform.state_dict()) == {"loc", "scale_tril"}
    assert transform.float().loc.dtype == torch.float32


def test_whitening_keeps_a_copy_of_its_own():
    loc, scale_tril = torch.zeros(2), torch.eye(2)
    transform = Whitening(loc, scale_tril)
    loc.add_(1)
    scale_tril.mul_(3)
    assert torch.equal(transform(torch.ones(2)), torch.ones(2))


def test_whitening_ignores_what_is_above_the_diagonal():
    full = torch.tensor([[1.0, 7.0], [0.5, 2.0]])
    assert torch.equal(Whitening(torch.zeros(2), full).scale_tril, full.tril())


@pytest.mark.parametrize(
    ("loc", "scale_tril", "message"),
    [
        (torch.zeros(2), torch.eye(3), r"got \(2,\) and \(3, 3\)"),
        (torch.zeros(2, 1), torch.eye(2), r"got \(2, 1\) and \(2, 2\)"),
        (torch.zeros(2), torch.diag(torch.tensor([1.0, 0.0])), "diagonal .* must be positive"),
        (torch.zeros(2), -torch.eye(2), "diagonal .* must be positive"),
        (torch.full((2,), torch.nan), torch.eye(2), "must be finite"),
        (torch.zeros(2), torch.full((2, 2), torch.inf), "must be finite"),
    ],
    ids=["sizes", "matrix-loc", "singular", "negative", "nan", "infinite"],
)
def test_whitening_refuses(loc, scale_tril, message):
    with pytest.raises(ValueError, match=rf"whitening: .*{message}"):
        Whitening(loc, scale_tril)


@pytest.mark.parametrize("transform", [ElementwiseAffine(3), whitening()], ids=repr)
@pytest.mark.parametrize("method", ["forward_and_ladj", "inverse_and_ladj"])
def test_bad_shapes(transform, method):
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(\*, 3\), got \(5, 2\)"):
        getattr(transform, method)(torch.zeros(5, 2))


def test_bad_dimension():
    with pytest.raises(ValueError, match="input_dim: expected a positive integer, got 0"):
        ElementwiseAffine(0)
