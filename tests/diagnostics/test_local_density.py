"""The log joint by datum, as a function of unconstrained latents, against densities written down by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_flows_ext.diagnostics.local_density import LocalDensity, local_density

X = torch.tensor([[0.5, 1.5, -0.2, 0.9], [0.3, -1.0, 0.1, 2.0], [1.1, 0.2, 0.0, -0.4]])


def nested(x=X):
    """By datum: a scale, and a location for each of four items; two numbers outside of the plate."""
    pyro.sample("outside", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
    with pyro.plate("data", len(x), dim=-2):
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("items", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(1.0, s))
            pyro.deterministic("double", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def nested_guide(x=X):
    with pyro.plate("data", len(x), dim=-2):
        s = pyro.sample("s", dist.LogNormal(x[:, :1], 0.3))
        with pyro.plate("items", 4, dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, s))


def log_s(u):
    return dist.Normal(0.0, 0.5).log_prob(u[..., 0])


def log_joint(u, x=X):
    z, s = u[..., 1:], u[..., :1].exp()
    log_p = dist.Normal(1.0, s).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    return log_s(u) + log_p.sum(-1)


def test_by_datum():
    density = local_density(nested, nested_guide, (), {})
    assert (density.data_shape, density.dim) == ((3,), 5)
    u = torch.randn(6, 3, 5)
    torch.testing.assert_close(density(u), log_joint(u))
    prior, joint = density.prior_and_joint(u)
    expected = log_s(u) + dist.Normal(1.0, u[..., :1].exp()).log_prob(u[..., 1:]).sum(-1)
    torch.testing.assert_close(prior, expected)
    torch.testing.assert_close(joint, log_joint(u))


def test_without_plates_all_is_one_datum():
    density = LocalDensity(nested)
    assert (density.data_shape, density.dim) == ((), 15)
    u = torch.randn(6, 3, 5)
    flat = torch.cat([u[..., 0], u[..., 1:].flatten(1)], -1)  # site by site
    outside = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
    torch.testing.assert_close(density(flat), log_joint(u).sum(-1) + outside)


def test_gradient():
    density = local_density(nested, nested_guide, (), {})
    u = torch.randn(2, 3, 5)
    value, gradient = density.value_and_gradient(u)
    leaf = u.clone().requires_grad_()
    log_joint(leaf).sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
    torch.testing.assert_close(value, log_joint(u))
    assert not value.requires_grad


def test_guide_draws_and_density():
    density = local_density(nested, nested_guide, (), {})
    u, log_q = density.draw_guide(nested_guide, 7)
    s = u[..., :1].exp()
    expected = dist.Normal(X[:, 0], 0.3).log_prob(u[..., 0])
    expected = expected + dist.Normal(0.5 * X, s).log_prob(u[..., 1:]).sum(-1)
    torch.testing.assert_close(log_q, expected)
    torch.testing.assert_close(density.log_guide(nested_guide, u), expected)


def test_layout_goes_back_and_forth():
    density = local_density(nested, nested_guide, (), {})
    u = torch.randn(5, 3, 5)
    values, ladj = density.constrain(u)
    assert values["s"].shape == (5, 3, 1)
    assert values["z"].shape == (5, 3, 4)
    torch.testing.assert_close(ladj, u[..., 0])
    back, ladj = density.unconstrain(values, 5)
    torch.testing.assert_close(back, u)
    torch.testing.assert_close(ladj, u[..., 0])


def test_prior_draws():
    u = LocalDensity(nested, plates=("data",)).draw_prior(4000)
    assert u.shape == (4000, 3, 5)
    torch.testing.assert_close(u[..., 0].std(0), torch.full((3,), 0.5), rtol=0.06, atol=0.0)
    torch.testing.assert_close(u[..., 1:].mean(0), torch.ones(3, 4), rtol=0.0, atol=0.1)


def test_a_simplex_has_a_coordinate_less():
    def model(x):
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Categorical(p), obs=x)

    x = torch.tensor([0, 2])
    density = LocalDensity(model, (x,), plates=("data",))
    assert density.dim == 2
    # Over the simplex, p_x has mean 1/3: the evidence of one observation.
    grid = torch.linspace(-12.0, 12.0, 241)
    u = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 1, 2)
    mass = density(u.expand(-1, 2, -1)).logsumexp(0).exp() * 0.1**2
    torch.testing.assert_close(mass, torch.full((2,), 1 / 3), rtol=1e-3, atol=0.0)


# --- scales, masks, subsamples ---


def weighted(x, size=None, power=1.0):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=power), poutine.mask(mask=x[index] > 0):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def weighted_guide(x, size=None, power=1.0):
    with pyro.plate("data", len(x), subsample_size=size) as index:
        pyro.sample("z", dist.Normal(0.5 * x[index], 0.7))


@pytest.mark.parametrize("size", [None, 5], ids=["all", "subsample"])
def test_scale_of_the_data_is_none_and_any_other_stays(size):
    x = torch.linspace(-1.0, 2.0, 20)
    density = local_density(weighted, weighted_guide, (x, size, 0.5), {})
    index = density.subsamples["data"]
    assert len(index.unique()) == (size or 20)
    u = torch.randn(3, len(index), 1)
    for _ in range(2):  # the same data again
        log_p = dist.Normal(u[..., 0], 1.0).log_prob(x[index])
        expected = dist.Normal(0.0, 1.0).log_prob(u[..., 0]) + 0.5 * (x[index] > 0) * log_p
        torch.testing.assert_close(density(u), expected)
    u, log_q = density.draw_guide(weighted_guide, 3)
    torch.testing.assert_close(log_q, dist.Normal(0.5 * x[index], 0.7).log_prob(u[..., 0]))


def test_nan_is_no_density():
    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("wall", torch.where(z < -4, torch.nan, 0.0))

    value, gradient = LocalDensity(model, plates=("data",)).value_and_gradient(
        torch.tensor([[[1.0], [-5.0]]])
    )
    assert value.isfinite().tolist() == [[True, False]]
    assert value[0, 1] == -torch.inf
    assert gradient[0, 1, 0] == 0


# --- refusals ---


def with_global():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(mu, 1.0))


def coupled():
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=torch.ones(1))


def plain():
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def looped():
    for _ in pyro.plate("data", 1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def discrete():
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Poisson(1.0))


def plain_and_factor():
    plain()
    pyro.factor("r", torch.tensor(0.3), has_rsample=True)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (with_global, with_global, "one data plate"),
        (coupled, plain, "'x' lies outside"),
        (plain, lambda: None, "every latent"),
        (looped, looped, "loop"),
        (discrete, discrete, "discrete"),
        (plain, plain_and_factor, "'r' of the guide lies outside"),
    ],
    ids=["global", "coupled", "missing", "loop", "discrete", "factor"],
)
def test_refusals(model, guide, message):
    with pytest.raises(ValueError, match=message):
        local_density(model, guide, (), {})


def test_global_latents_can_be_fixed():
    model = poutine.condition(with_global, data={"mu": torch.tensor(0.5)})
    density = local_density(model, plain, (), {})
    u = torch.randn(3, 4, 1)
    torch.testing.assert_close(density(u), dist.Normal(0.5, 1.0).log_prob(u[..., 0]))
