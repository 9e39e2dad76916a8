"""Transforms of the channels at every pixel: against a loop over pixels, against convolutions, and at contexts."""

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

from pyro_flows_ext.testing import POINTS, perturb
from pyro_flows_ext.transforms import (
    ActNorm,
    ComposeFlow,
    ElementwiseAffine,
    HouseholderLinear,
    Invertible1x1Conv,
    LULinear,
    Permute,
    Pixelwise,
    Squeeze,
    affine_coupling,
    batchnorm,
    conditional_affine_coupling,
    conditional_planar,
    planar,
    spline_autoregressive,
    spline_coupling,
    sylvester,
)

INNER = {
    "planar": lambda: planar(3),
    "planar-inverse": lambda: planar(3).inv,
    "lu": lambda: LULinear(3, permute=True),
    "permute": lambda: Permute([2, 0, 1]),
    "actnorm": lambda: ActNorm(3),
    "coupling": lambda: affine_coupling(3, (4,)),
    "autoregressive": lambda: spline_autoregressive(3, (4,), num_bins=3),
    "compose": lambda: ComposeFlow([planar(3), spline_coupling(3, (4,), num_bins=3)]),
}
CONDITIONAL = {
    "planar": lambda: conditional_planar(3, 2, (4,)),
    "planar-inverse": lambda: conditional_planar(3, 2, (4,)).inv,
    "affine": lambda: ElementwiseAffine(3, context_dim=2, hidden_dims=(4,)),
    "lu": lambda: LULinear(3, permute=True, context_dim=2, hidden_dims=(4,)),
    "sylvester": lambda: sylvester(3, context_dim=2, hidden_dims=(4,)),
    "coupling": lambda: conditional_affine_coupling(3, 2, (4,)),
}
METHODS = ("forward_and_ladj", "inverse_and_ladj")


def by_pixel(transform, method, x):
    """The same by a loop, for x `(C, H, W)`."""
    y, total = torch.empty_like(x), 0.0
    for h in range(x.shape[-2]):
        for w in range(x.shape[-1]):
            y[:, h, w], ladj = getattr(transform, method)(x[:, h, w])
            total = total + ladj
    return y, total


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_is_a_loop_over_pixels(inner, batch, method):
    transform = perturb(INNER[inner]().double())
    x = torch.randn(*batch, 3, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        y, ladj = getattr(Pixelwise(transform), method)(x)
        assert y.shape == x.shape
        assert ladj.shape == batch
        for i, image in enumerate(x.reshape(-1, 3, 2, 4)):
            expected = by_pixel(transform, method, image)
            torch.testing.assert_close(y.reshape(-1, 3, 2, 4)[i], expected[0])
            torch.testing.assert_close(ladj.reshape(-1)[i], expected[1])


@pytest.mark.parametrize("inner", CONDITIONAL)
@pytest.mark.parametrize(
    ("context_batch", "x_batch"),
    [((), (3,)), ((3,), ()), ((3,), (3,)), ((3,), (4, 3)), ((4, 1), (3,)), ((4, 3), (3,))],
    ids=str,
)
def test_one_map_for_each_image(inner, context_batch, x_batch):
    conditional = perturb(CONDITIONAL[inner]().double())
    # Every dimension but the channels is of a size of its own, or equal to one that it may be mistaken for.
    context, x = torch.randn(*context_batch, 2).double(), torch.randn(*x_batch, 3, 4, 3).double()
    batch = torch.broadcast_shapes(context_batch, x_batch)
    contexts, images = context.expand(*batch, 2).reshape(-1, 2), x.expand(*batch, 3, 4, 3)
    for transform in (
        Pixelwise(conditional).condition(context),
        Pixelwise(conditional.condition(context)),
    ):
        assert transform.batch_shape == context_batch
        assert transform.forward_shape(x.shape) == (*batch, 3, 4, 3)
        for method in METHODS:
            with torch.no_grad():
                y, ladj = getattr(transform, method)(x)
                assert y.shape == (*batch, 3, 4, 3)
                assert ladj.shape == batch
                for i, image in enumerate(images.reshape(-1, 3, 4, 3)):
                    expected = by_pixel(conditional.condition(contexts[i]), method, image)
                    torch.testing.assert_close(y.reshape(-1, 3, 4, 3)[i], expected[0])
                    torch.testing.assert_close(ladj.reshape(-1)[i], expected[1])


def test_conditional_starts_as_the_plain_one():
    conditional = Invertible1x1Conv(3, context_dim=2)
    plain, x = Pixelwise(conditional.transform.bind({})), torch.randn(5, 3, 2, 2)
    bound = conditional.condition(torch.randn(5, 2))
    torch.testing.assert_close(bound.forward_and_ladj(x), plain.forward_and_ladj(x))


def test_gradients_reach_the_network_and_the_context():
    conditional, context = perturb(Invertible1x1Conv(3, context_dim=2)), torch.randn(5, 2)
    bound = conditional.condition(context.requires_grad_())
    x, ladj = bound.inverse_and_ladj(torch.randn(5, 3, 2, 2))
    hyper = list(conditional.transform.hyper.parameters())
    grads = torch.autograd.grad((x**2).sum() + ladj.sum(), [context, *hyper])
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


def test_condition_reaches_the_inner_transform():
    stack = ComposeFlow([Squeeze(2), Pixelwise(affine_coupling(4, (5,), context_dim=2).inv)])
    perturb(stack)
    context, x = torch.randn(3, 2), torch.randn(3, 1, 4, 4)
    y, ladj = stack.condition(context).forward_and_ladj(x)
    inner = stack[1].transform.transform
    squeezed = Squeeze(2)(x)
    expected = Pixelwise(inner.condition(context)).inverse_and_ladj(squeezed)
    torch.testing.assert_close((y, ladj), expected)
    with pytest.raises(ValueError, match=r"condition\(context\) first"):
        stack(x)


@pytest.mark.parametrize("inverted", [False, True], ids=["", "inverse"])
def test_the_cache_sees_what_the_inner_transform_is_bound_to(inverted):
    context, x = torch.randn(3, 2), torch.randn(3, 3, 2, 2)
    inner = perturb(affine_coupling(3, (5,), context_dim=2)).condition(context)
    bound = Pixelwise(inner.inv if inverted else inner)
    with torch.no_grad():
        before = bound(x)
        assert bound(x) is before
        context.add_(1.0)
        assert not torch.allclose(bound(x), before)


# --- ActNorm and BatchNorm ---


@pytest.mark.parametrize("inverse", [False, True])
def test_initialize_takes_images(inverse):
    transform = Pixelwise(ActNorm(3)).double()
    batch = torch.randn(2, 4, 3, 5, 6).double() * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 2
    transform.initialize(batch, inverse=inverse)
    y = (transform.inv if inverse else transform)(batch).movedim(-3, 0).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(3).double())
    torch.testing.assert_close(y.std(1, correction=0), torch.ones(3).double())


def test_initialize_refuses_vectors_and_is_there_only_for_those_who_have_it():
    with pytest.raises(ValueError, match="batch: expected 3 event dimensions"):
        Pixelwise(ActNorm(3)).initialize(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"batch: expected a tensor of shape \(\*, 3\)"):
        Pixelwise(ActNorm(3)).initialize(torch.zeros(2, 4, 3, 3))
    assert hasattr(Pixelwise(ActNorm(3)), "initialize")
    assert not hasattr(Pixelwise(planar(3)), "initialize")


def test_first_batch_initialises():
    transform = Pixelwise(ActNorm(3, initialize_on_first_batch=True))
    batch = torch.randn(8, 3, 4, 4) * 3 + 1
    x, _ = transform.inverse_and_ladj(batch)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(transform.transform.loc, batch.mean((0, 2, 3)))
    assert transform.inverse_and_ladj(batch / 2)[0].std() < 0.6  # the second changes nothing


def test_batchnorm_counts_pixels_for_rows():
    transform = Pixelwise(batchnorm(3, momentum=1.0))
    batch = torch.randn(1, 3, 4, 4) * 3 + 1
    transform.inverse_and_ladj(batch)
    torch.testing.assert_close(transform.transform.moving_mean, batch.mean((0, 2, 3)))
    torch.testing.assert_close(transform.transform.moving_var, batch.var((0, 2, 3)))


# --- the 1x1 convolution ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (64, 4, 16, 16)], ids=str)  # factors, or formed
def test_is_a_convolution(bias, shape):
    transform = perturb(Invertible1x1Conv(4, bias=bias).double())
    lu = transform.transform.lu.detach()
    slope = torch.where(
        lu.diagonal() < 0, (lu.diagonal() / 0.999).exp() * 0.999 + 0.001, 1 + lu.diagonal()
    )
    L, U = lu.tril(-1) + torch.eye(4), lu.triu(1) + slope.diag()
    W = (L @ U)[transform.transform.permutation]
    b = transform.transform.bias.detach()[transform.transform.permutation] if bias else None
    x = torch.randn(shape).double()
    y, ladj = transform.forward_and_ladj(x)
    torch.testing.assert_close(y, F.conv2d(x, W[:, :, None, None], b))
    expected = shape[-1] * shape[-2] * torch.linalg.slogdet(W)[1]
    torch.testing.assert_close(ladj, expected.expand(shape[0]))


def test_starts_at_a_permutation_of_the_channels():
    x = torch.randn(2, 5, 3, 3)
    transform = Invertible1x1Conv(5)
    y, ladj = transform.forward_and_ladj(x)
    assert torch.equal(y, x[:, transform.transform.permutation])
    assert not ladj.any()
    assert torch.equal(Invertible1x1Conv(5, permute=False)(x), x)


def test_density_of_a_convolved_normal():
    transform = perturb(Invertible1x1Conv(2, bias=True).double())
    base = dist.Normal(torch.zeros(2, 2, 1).double(), 1.0).to_event(3)
    flow = dist.TransformedDistribution(base, [transform])
    eye = torch.eye(2).double()[:, :, None, None].expand(2, 2, 2, 1)
    b = transform(torch.zeros(2, 2, 1).double())[:, 0, 0]
    W = transform(eye)[:, :, 0, 0].mT - b.unsqueeze(-1)
    pixel = dist.MultivariateNormal(b, W @ W.mT)
    y = torch.randn(6, 2, 2, 1).double()
    expected = pixel.log_prob(y[:, :, 0, 0]) + pixel.log_prob(y[:, :, 1, 0])
    torch.testing.assert_close(flow.log_prob(y), expected)


# --- what else a transform has ---


@pytest.mark.parametrize(
    ("inner", "sign"),
    [
        (lambda: planar(3), 1),
        (lambda: Permute([1, 2, 0]), 1),
        (lambda: Permute([1, 0, 2]), 0),
        (lambda: HouseholderLinear(3, num_reflections=2), 1),
        (lambda: HouseholderLinear(3, num_reflections=1), 0),
    ],
    ids=["planar", "even", "odd", "rotation", "mirror"],
)
def test_sign_is_known_where_the_number_of_pixels_does_not_matter(inner, sign):
    transform = Pixelwise(inner())
    assert transform.sign == sign
    assert ComposeFlow([transform, Pixelwise(planar(3))]).sign == sign
    POINTS[2].check(lambda: Pixelwise(inner()), event_shape=(3, 1, 1))


def test_function_transforms():
    transform = Pixelwise(perturb(spline_coupling(2, (4,), num_bins=3).double()))
    x = torch.randn(3, 2, 2, 1).double()
    for method in METHODS:
        run = getattr(transform, method)
        torch.testing.assert_close(torch.vmap(run)(x), run(x))


def test_empty_batch():
    y, ladj = Invertible1x1Conv(2).forward_and_ladj(torch.zeros(0, 2, 3, 3))
    assert y.shape == (0, 2, 3, 3)
    assert ladj.shape == (0,)


def test_refuses():
    with pytest.raises(TypeError, match="transform: expected a FlowTransform, got Linear"):
        Pixelwise(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected a transform of vectors, got Squeeze\(2\)"):
        Pixelwise(Squeeze(2))
    transform = Invertible1x1Conv(3)
    with pytest.raises(ValueError, match=r"x: expected 3 event dimensions, got shape \(3, 2\)"):
        transform(torch.zeros(3, 2))
    with pytest.raises(
        ValueError, match=r"expected a tensor of shape \(\*, 3\), got \(5, 2, 2, 4\)"
    ):
        transform.inv(torch.zeros(5, 4, 2, 2))


def test_repr():
    assert repr(Pixelwise(planar(3))) == "Pixelwise(Planar(3, num_layers=1))"
    assert repr(Invertible1x1Conv(3)) == "Invertible1x1Conv(3, bias=False, permute=True)"
    bound = Invertible1x1Conv(3, context_dim=2).condition(torch.zeros(5, 2))
    assert "batch_shape=(5,)" in repr(bound)
    assert "context_dim=2" in repr(Invertible1x1Conv(3, context_dim=2))
