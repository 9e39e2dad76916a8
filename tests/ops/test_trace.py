"""log det(I + J) from products with J: exact, and in the mean over all that is random."""

import itertools
import math

import pytest
import torch

from pyro_flows_ext.ops import (
    Opaque,
    dense_jacobian,
    exact_log_det,
    log_det_series,
    neumann_log_det,
    roulette_weights,
)

D = 3


def contraction(*batch, norm=0.8):
    """Matrices `(*, D, D)` of spectral norm `norm`."""
    A = torch.randn(*batch, D, D, dtype=torch.float64)
    return norm * A / torch.linalg.matrix_norm(A, 2, keepdim=True)


def product_with(J):
    return lambda V: (J @ V.unsqueeze(-1)).squeeze(-1)


def all_signs():
    """Every Rademacher vector, `(2ᴰ, D)`: their mean is the expectation."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D)), dtype=torch.float64)


def probes(batch):
    return all_signs().reshape(-1, *[1] * len(batch), D)


def log_det(J):
    return torch.linalg.slogdet(torch.eye(D, dtype=J.dtype) + J).logabsdet


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_dense_and_exact(batch):
    J = contraction(*batch)
    x = torch.randn(*batch, D, dtype=torch.float64)
    torch.testing.assert_close(dense_jacobian(product_with(J), x), J)
    torch.testing.assert_close(exact_log_det(product_with(J), x), log_det(J))


def test_dense_of_a_product_without_a_batch():
    J = contraction()
    x = torch.randn(4, D, dtype=torch.float64)
    torch.testing.assert_close(dense_jacobian(product_with(J), x), J.expand(4, D, D))


def test_events_of_three_dimensions():
    J = torch.randn(5, 8, 8, dtype=torch.float64)
    x = torch.randn(5, 2, 2, 2, dtype=torch.float64)

    def product(V):
        return product_with(J)(V.flatten(-3)).unflatten(-1, (2, 2, 2))

    torch.testing.assert_close(dense_jacobian(product, x, 3), J)


@pytest.mark.parametrize("estimate", [log_det_series, neumann_log_det])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_series_over_all_probes_is_the_log_det(estimate, batch):
    J = contraction(*batch)
    found = estimate(product_with(J), probes(batch), (1.0,) * 150)
    torch.testing.assert_close(found, log_det(J), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_value_at_one_probe_is_the_weighted_sum(terms):
    J = contraction()
    v, weights = torch.randn(D, dtype=torch.float64), torch.rand(terms).tolist()
    powers = [torch.linalg.matrix_power(J, k) for k in range(1, terms + 1)]
    expected = sum(
        -((-1) ** k) * w / k * (v @ P @ v)
        for k, (w, P) in enumerate(zip(weights, powers, strict=True), 1)
    )
    for estimate in (log_det_series, neumann_log_det):
        torch.testing.assert_close(estimate(product_with(J), v[None], weights), expected)


@pytest.mark.parametrize("estimate", [log_det_series, neumann_log_det])
def test_gradients_honour_the_weight_of_each_row(estimate):
    """As in an importance-weighted bound: weights that differ by orders of magnitude, and by sign."""
    J = contraction(4).requires_grad_()
    weight = torch.tensor([1.0, -100.0, 0.01, 3.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad((weight * log_det(J)).sum(), J)
    found = estimate(product_with(J), probes((4,)), (1.0,) * 150)
    (actual,) = torch.autograd.grad((weight * found).sum(), J)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_neumann_gradient_of_a_truncated_series_is_the_truncated_gradient():
    """Σ_k (-1)ᵏ w_(k+1) tr(dJ Jᵏ), k = 0, ..., n - 1: the weight of a term is that of its value."""
    J, weights = contraction().requires_grad_(), (1.0, 1.0, 2.0, 4.0)
    (actual,) = torch.autograd.grad(neumann_log_det(product_with(J), probes(()), weights), J)
    expected = sum(
        (-1) ** k * w * torch.linalg.matrix_power(J.detach(), k).T for k, w in enumerate(weights)
    )
    torch.testing.assert_close(actual, expected)


def saved_numbers(run):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        run()
    return sum(saved)


def test_neumann_keeps_one_product():
    J = contraction(4).requires_grad_()
    sizes = {
        (estimate, n): saved_numbers(
            lambda e=estimate, n=n: e(product_with(J), probes((4,)), (1.0,) * n)
        )
        for estimate in (log_det_series, neumann_log_det)
        for n in (2, 20)
    }
    assert sizes[neumann_log_det, 20] == sizes[neumann_log_det, 2]
    assert sizes[log_det_series, 20] > 5 * sizes[log_det_series, 2]


@pytest.mark.parametrize("continue_prob", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("num_exact", [1, 4])
def test_roulette_weights_are_one_in_the_mean(continue_prob, num_exact):
    """With P(N = n) = (1 - p) pⁿ further terms; estimates are linear in the weights, and so unbiased."""
    mean = torch.zeros(12, dtype=torch.float64)
    for n in range(math.ceil(math.log(1e-25) / math.log(continue_prob))):
        weights = roulette_weights(num_exact + n, num_exact, continue_prob)[:12]
        probability = (1 - continue_prob) * continue_prob**n
        mean[: len(weights)] += probability * torch.tensor(weights, dtype=torch.float64)
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-10, atol=0)


# What torch's own forward-mode formulas warn of when they are first loaded.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_opaque_functions():
    W = contraction()

    def g(x):
        return torch.sin(x) @ W.T

    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    value, product = Opaque(g).linearize(x)
    torch.testing.assert_close(value, g(x))
    J = torch.func.vmap(torch.func.jacrev(g))(x)
    torch.testing.assert_close(dense_jacobian(product, x), J)
    grads = [
        torch.autograd.grad(run().sum(), x)[0]
        for run in (lambda: exact_log_det(Opaque(g).linearize(x)[1], x), lambda: log_det(J))
    ]
    torch.testing.assert_close(*grads)
