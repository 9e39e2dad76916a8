"""Estimated log-dets of residual flows: unbiased, by value and by gradient, row by row, and the same for the same noise."""

import pyro.distributions as dist
import pytest
import torch
from residual_flows import D, all_signs, exact_noise, ladj_of, leaves_of, made, made_exact, normal

from pyro_flows_ext.ops import roulette_weights
from pyro_flows_ext.testing import perturb
from pyro_flows_ext.transforms import LogDetNoise, ResidualFlow

# --- estimates ---


@pytest.mark.parametrize("options", [{}, {"num_probes": 4, "continue_prob": 0.8}], ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_estimates_are_unbiased(train, inverse, options):
    """Within four standard errors of the exact value, over many draws."""
    transform = made(train=train, exact_log_det=False, **options)
    x = normal()
    exact = ladj_of(made_exact(transform), inverse)(x)
    rows = x.expand(50, D)
    with torch.no_grad():
        # Draws share their number of terms over the rows: the mean of a pass is one observation.
        means = torch.stack([ladj_of(transform, inverse)(rows).mean() for _ in range(200)])
    error = (means.mean() - exact).abs()
    standard_error = means.std() / len(means) ** 0.5
    assert 0 < standard_error < 0.1
    assert error < 4 * standard_error


def test_number_of_terms():
    """n_exact + N, P(N >= k) = continue_probᵏ, with the weights that make up for it."""
    transform = made(train=True, num_exact_terms=3, continue_prob=0.7)
    noises = [transform.draw_noise(normal()) for _ in range(4000)]
    numbers = torch.tensor([float(noise.num_terms) for noise in noises])
    for k in range(6):
        p = 0.7**k
        error = (numbers >= 3 + k).float().mean().item() - p
        assert abs(error) <= 4 * (p * (1 - p) / len(noises)) ** 0.5
    for noise in noises[:20]:
        assert noise.weights == roulette_weights(noise.num_terms, 3, 0.7)


@pytest.mark.parametrize(("train", "least"), [(True, 2), (False, 20)])
def test_leading_terms_of_the_mode(train, least):
    transform = made(train=train)
    assert min(transform.draw_noise(normal()).num_terms for _ in range(100)) == least


def test_probes_are_signs_of_their_own():
    transform = made(train=True, num_probes=3)
    v = transform.draw_noise(normal(500)).v
    assert v.shape == (3, 500, D)
    assert v.dtype == torch.float64
    assert v.abs().min() == v.abs().max() == 1
    torch.testing.assert_close(
        v.flatten(0, 1).T.cov(), torch.eye(D, dtype=v.dtype), atol=0.1, rtol=0
    )


def test_generator():
    transform, x = made(train=True), normal(4)
    draws = [transform.draw_noise(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    state = torch.get_rng_state()
    assert torch.equal(draws[0].v, draws[1].v)
    assert draws[0].weights == draws[1].weights
    assert not torch.equal(draws[0].v, draws[2].v)
    assert torch.equal(state, torch.get_rng_state())


# --- gradients of estimates ---


def expected_gradients(transform, loss, leaves):
    """The mean gradient over all probes and all numbers of terms, each with its probability."""
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for n in range(45):
        probability = 0.5 ** (n + 1)
        noise = LogDetNoise(all_signs(), roulette_weights(60 + n, 60, 0.5))
        grads = torch.autograd.grad(
            loss(transform.with_noise(noise)), leaves, allow_unused=True, materialize_grads=True
        )
        total = [t + probability * g for t, g in zip(total, grads, strict=True)]
    return total


@pytest.mark.slow
@pytest.mark.parametrize("neumann_gradient", [True, False], ids=["neumann", "series"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradients_are_unbiased_for_each_row(neumann_gradient, inverse):
    """Weighted row by row, as in an importance-weighted bound, for x, context and parameters."""
    conditional = ResidualFlow(
        D, (8, 8), context_dim=2, lipschitz=0.9, neumann_gradient=neumann_gradient
    ).double()
    perturb(conditional)
    with torch.no_grad():
        for layer in conditional.net.layers:
            layer.weight.add_(2 * torch.eye(*layer.weight.shape))
    context, x = torch.randn(4, 2, dtype=torch.float64), normal(4)
    leaves = leaves_of(conditional, x.requires_grad_(), context.requires_grad_())
    weight = torch.tensor([1.0, -10.0, 0.1, 3.0], dtype=torch.float64)
    transform = conditional.condition(context)

    def loss(transform):
        return (weight * ladj_of(transform, inverse)(x)).sum()

    expected = torch.autograd.grad(
        loss(made_exact(transform)), leaves, allow_unused=True, materialize_grads=True
    )
    actual = expected_gradients(transform, loss, leaves)
    torch.testing.assert_close(actual, list(expected), rtol=1e-5, atol=1e-5)
    assert all(grad.abs().max() > 1e-3 for grad in expected[:2])


def test_importance_weighted_bound():
    """The gradient of log-mean-exp over rows, whose weights the pass cannot know."""
    transform, x = made(lipschitz=0.8), normal(5).requires_grad_()
    leaves = leaves_of(transform, x)
    grads = [
        torch.autograd.grad(
            (3 * ladj_of(t)(x)).logsumexp(0), leaves, allow_unused=True, materialize_grads=True
        )
        for t in (transform.with_noise(exact_noise(80)), made_exact(transform))
    ]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_memory_does_not_grow_with_the_terms():
    sizes = {}
    for neumann_gradient in (True, False):
        for terms in (2, 30):
            transform, saved = made(neumann_gradient=neumann_gradient), []
            view = transform.with_noise(LogDetNoise(normal(1, 4), (1.0,) * terms))
            x = normal(4)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
            ):
                view.forward_and_ladj(x)
            sizes[neumann_gradient, terms] = sum(saved)
    assert sizes[True, 2] == sizes[True, 30]
    assert sizes[False, 30] > 3 * sizes[False, 2]


# --- noise held fixed ---


def test_a_value_is_scored_the_same_again():
    transform, x = made(train=True), normal(5)
    noise = transform.draw_noise(x)
    view = transform.with_noise(noise)
    y, ladj = view.forward_and_ladj(x)
    assert torch.equal(view.forward_and_ladj(x)[1], ladj)
    assert torch.equal(view.log_abs_det_jacobian(x, y), ladj)
    torch.testing.assert_close(view.inverse_and_ladj(y)[1], -ladj, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(view.inv(y), x, rtol=1e-10, atol=1e-10)
    view.eval()
    assert torch.equal(transform.with_noise(noise).forward_and_ladj(x)[1], ladj)
    transform.train()
    assert not torch.equal(transform.forward_and_ladj(x)[1], ladj)


def test_one_pass_is_one_draw():
    """A sample and its log-density come from one estimate, by the cache."""
    transform = made(train=True)
    flow = dist.TransformedDistribution(
        dist.Normal(torch.zeros(D).double(), 1).to_event(1), [transform]
    )
    y = flow.rsample((4,))
    assert torch.equal(flow.log_prob(y), flow.log_prob(y))
    again = y.clone()
    assert not torch.equal(flow.log_prob(again), flow.log_prob(y))


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)
def test_noise_broadcasts(batch):
    transform, x = made(), normal(*batch)
    v = normal(2)
    shared = transform.with_noise(LogDetNoise(v, (1.0,) * 5)).forward_and_ladj(x)[1]
    each = v.reshape(2, *[1] * len(batch), D).expand(2, *batch, D)
    torch.testing.assert_close(
        transform.with_noise(LogDetNoise(each, (1.0,) * 5)).forward_and_ladj(x)[1], shared
    )
    assert shared.shape == batch


def test_noise_and_context_in_either_order():
    conditional = perturb(ResidualFlow(D, (4,), context_dim=2).double())
    x, context = normal(4), torch.randn(4, 2, dtype=torch.float64)
    noise = conditional.condition(context).draw_noise(normal())
    assert noise.v.shape == (1, 4, D)
    ladjs = [
        conditional.condition(context).with_noise(noise).forward_and_ladj(x)[1],
        conditional.with_noise(noise).condition(context).forward_and_ladj(x)[1],
    ]
    assert torch.equal(*ladjs)
