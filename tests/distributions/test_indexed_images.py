"""`ContinuouslyIndexedFlow` of images: indices that are images or vectors, contexts, whole numbers, bounds in Pyro."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import LOG_1000, indexed_images, normal
from pyro.infer import SVI
from pyro.optim import Adam

import pyro_flows_ext.transforms as T
from pyro_flows_ext.distributions import ContinuouslyIndexedFlow, Dequantized, FlowDistribution
from pyro_flows_ext.infer import ImportanceWeightedELBO, fit_density
from pyro_flows_ext.testing import perturb

KINDS = pytest.mark.parametrize("index_image", [True, False], ids=["image", "vector"])


def images(*shape):
    return torch.randn(*shape, 1, 4, 4, dtype=torch.float64)


@KINDS
def test_starts_as_the_flow_without_indices(index_image):
    density = indexed_images(index_image=index_image).double()
    parts = [layer.indexed.transform for layer in density.layers]
    for part in parts:
        perturb(part, scale=0.3)
    plain = FlowDistribution(normal(4, 2, 2), parts).double()
    x = images(5)
    torch.testing.assert_close(density.log_prob(x), plain.log_prob(x))
    torch.testing.assert_close(density.log_prob_bound(x, 3), plain.log_prob(x))


@KINDS
def test_shapes_of_indices_follow_the_images(index_image):
    density = indexed_images(index_image=index_image)
    expected = [(2, 2, 2), (2, 2, 2), (2, 4, 4)] if index_image else [(2,)] * 3
    assert [tuple(layer.index_shape) for layer in density.layers] == expected
    assert (density.index_dim, tuple(density.event_shape)) == (2, (1, 4, 4))


@KINDS
def test_joint_density_is_that_of_the_change_of_variables(index_image):
    """log p(x, u) against autograd through the map from (z, ε) to (x, u)."""
    density = perturb(indexed_images(index_image=index_image), scale=0.3).double()
    shapes = [layer.index_shape for layer in density.layers]
    sizes = [16, *(shape.numel() for shape in shapes)]
    noise = torch.randn(sum(sizes), dtype=torch.float64)

    def joint(flat):
        start, *rest = flat.split(sizes)
        z, found = start.reshape(4, 2, 2), []
        for layer, eps, shape in zip(density.layers, rest, shapes, strict=True):
            z, u, _ = layer.push(z, eps.reshape(shape))
            found.append(u)
        return torch.cat([z.flatten(), *(u.flatten() for u in found)])

    jacobian = torch.autograd.functional.jacobian(joint, noise)
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - torch.linalg.slogdet(jacobian)[1]
    x, *indices = joint(noise).split(sizes)
    indices = [u.reshape(shape) for u, shape in zip(indices, shapes, strict=True)]
    log_p, _ = density._pull(x.reshape(1, 4, 4), indices)
    torch.testing.assert_close(log_p, expected)


def test_bound_against_quadrature_over_the_index():
    """One layer, u of one number for the whole image."""
    density = ContinuouslyIndexedFlow(
        normal(2, 2, 2), T.affine_coupling((2, 2, 2), (4,)), 1, (5,), (6,), index_image=False
    )
    density = perturb(density, scale=0.2).double()
    (layer,) = density.layers
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    u = torch.linspace(-30, 30, 3001, dtype=torch.float64)[:, None, None]
    z, ladj = layer.indexed.condition(u).inverse_and_ladj(x)
    loc, raw = layer.index_net(z).chunk(2, -1)
    scale = (LOG_1000 * (raw / LOG_1000).tanh()).exp()
    log_joint = dist.Normal(loc, scale).log_prob(u).squeeze(-1) + density.base.log_prob(z) + ladj
    exact = log_joint.logsumexp(0) + math.log(60 / 3000)
    with torch.no_grad():
        weights = (density.log_prob(x.expand(4000, 3, 2, 2, 2)) - exact).exp()
    error = weights.std(0) / 4000**0.5
    assert ((weights.mean(0) - 1).abs() <= 5 * error).all()
    assert (error < 0.1).all()


@KINDS
def test_context_by_row(index_image):
    density = indexed_images(index_image=index_image, context_dim=2)
    density = perturb(density, scale=0.3).double()
    context, x = torch.randn(5, 2, dtype=torch.float64), images(5)
    at = density.condition(context)
    assert (at.batch_shape, at.sample((3,)).shape) == ((5,), (3, 5, 1, 4, 4))
    torch.manual_seed(0)
    together = at.log_prob_bound(x, 4)
    # The first row of the same noise: every row of the others' context changed.
    other = torch.cat([context[:1], context[1:] + 1.0])
    torch.manual_seed(0)
    changed = density.condition(other).log_prob_bound(x, 4)
    torch.testing.assert_close(changed[0], together[0])
    assert not torch.isclose(changed[1:], together[1:]).any()
    with pytest.raises(ValueError, match=r"call condition\(context\) first"):
        density.log_prob(x)
    with pytest.raises(ValueError, match="expected a density with a context"):
        indexed_images().condition(context)


def test_contexts_have_units():
    density = perturb(indexed_images(context_dim=2), scale=0.3).double()
    context, x = torch.randn(5, 2, dtype=torch.float64), images(5)
    torch.manual_seed(0)
    plain = density.condition(context).log_prob(x)
    loc, scale = torch.tensor([3.0, -1.0]).double(), torch.tensor([2.0, 0.5]).double()
    density.standardize_context(loc, scale)
    torch.manual_seed(0)
    torch.testing.assert_close(density.condition(loc + scale * context).log_prob(x), plain)


def test_whole_numbers_and_training():
    """Dequantized, and trained with a context: images whose brightness it decides."""
    flow = indexed_images(context_dim=1)
    density = Dequantized(indexed_images(), num_levels=8)
    x = torch.randint(0, 8, (20, 1, 4, 4)).float()
    with torch.no_grad():
        assert density.bits_per_dim(x, num_particles=5).isfinite().all()
        drawn = density.sample((3,))
    assert ((drawn >= 0) & (drawn < 8) & (drawn == drawn.floor())).all()
    context = torch.randn(200, 1)
    rows = 2 * context[..., None, None] + 0.3 * torch.randn(200, 1, 4, 4)
    before = flow.condition(context).log_prob(rows).mean()
    fit_density(
        flow, rows, context=context, validation=None, num_steps=60, lr=1e-2, seed=0, progress=False
    )
    assert flow.condition(context).log_prob(rows).mean() > before + 3


@KINDS
def test_weighted_bound_in_a_plate_of_pyro(index_image):
    flow, x = perturb(indexed_images(index_image=index_image), scale=0.2), images(6).float()

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x), subsample_size=4) as i:
            flow.model("x", x[i])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=4) as i:
            flow.guide("x", x[i])

    loss = ImportanceWeightedELBO(num_particles=3, gradient="dreg", vectorize_particles=False)
    svi = SVI(model, guide, Adam({"lr": 1e-3}), loss)
    assert math.isfinite(svi.step(x))
    pyro.clear_param_store()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ContinuouslyIndexedFlow(normal(4), T.affine_coupling((2, 2, 2), (4,))),
            r"draws of at least 3 dimensions, got shape \(4,\)",
        ),
        (
            lambda: ContinuouslyIndexedFlow(
                normal(2, 2, 2), T.affine_coupling((2, 2, 2), (4,)), 1, (5, 6)
            ),
            "equal numbers of channels for images",
        ),
        (
            lambda: T.IndexedTransform(T.planar(4), (1, 2, 2)),
            "length of a vector for a transform of",
        ),
        (lambda: T.IndexedTransform(T.planar(4), (1, 2)), r"a positive integer or \(c, H, W\)"),
        (
            lambda: T.IndexedTransform(T.affine_coupling((2, 4, 4), (4,)), (1, 2, 2)).condition(
                torch.zeros(1, 2, 2)
            )(torch.zeros(2, 4, 4)),
            r"x: expected a tensor of shape \(\*, 2, 2, 2\)",
        ),
    ],
    ids=["base", "widths", "vectors", "shape", "size"],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
