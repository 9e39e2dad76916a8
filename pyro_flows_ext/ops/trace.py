"""log det(I + J) for a contraction whose Jacobian J is known by its products with vectors: exact, or estimated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

# V -> J V for vectors V `(K, *, event)`, K of them for each x `(*, event)`, or broadcast against x.
Product = Callable[[Tensor], Tensor]


class Linearizable(Protocol):
    """A map g of events: `g(x)`, and `g.linearize(x)`, which returns g(x) and the products with its Jacobian at x."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def linearize(self, x: Tensor) -> tuple[Tensor, Product]: ...


class Opaque:
    """Any function of events as a `Linearizable`, with products by forward-mode differentiation, one pass of g each.

    Example:
        >>> value, product = Opaque(lambda x: 2 * x).linearize(torch.ones(3))
        >>> product(torch.ones(1, 3))
        tensor([[2., 2., 2.]])
    """

    def __init__(self, g: Callable[[Tensor], Tensor]):
        self.g = g

    def __call__(self, x: Tensor) -> Tensor:
        return self.g(x)

    def linearize(self, x: Tensor) -> tuple[Tensor, Product]:
        def product(V: Tensor) -> Tensor:
            def one(v: Tensor) -> Tensor:
                return torch.func.jvp(self.g, (x,), (v,))[1]

            return torch.func.vmap(one)(V.expand(V.shape[0], *x.shape))

        return self.g(x), product


def dense_jacobian(product: Product, x: Tensor, event_dim: int = 1) -> Tensor:
    """Returns the Jacobian J as a matrix, `(*, D, D)`, from D products, taken at once.

    Args:
        product: V -> J V, as `Linearizable.linearize` returns it.
        x: the point, `(*, event)`.
        event_dim: number of event dimensions.
    """
    event, batch = x.shape[x.dim() - event_dim :], x.shape[: x.dim() - event_dim]
    D = event.numel()
    eye = torch.eye(D, dtype=x.dtype, device=x.device).reshape(D, *[1] * len(batch), *event)
    columns = product(eye).expand(D, *x.shape)
    return columns.flatten(columns.dim() - event_dim).movedim(0, -1)


def exact_log_det(product: Product, x: Tensor, event_dim: int = 1) -> Tensor:
    """Returns log det(I + J), `(*)`, for ‖J‖ < 1, hence a positive determinant.

    Cost: D products, taken at once, and an LU decomposition: O(D³) time and D times the memory of one product.

    Args:
        product: V -> J V, as `Linearizable.linearize` returns it.
        x: the point, `(*, event)`.
        event_dim: number of event dimensions.

    Example:
        >>> round(exact_log_det(lambda V: 0.5 * V, torch.zeros(2)).exp().item(), 4)
        2.25
    """
    J = dense_jacobian(product, x, event_dim)
    eye = torch.eye(J.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.slogdet(eye + J).logabsdet


def log_det_series(
    product: Product, v: Tensor, weights: Sequence[float], event_dim: int = 1
) -> Tensor:
    """Returns Σ_k (-1)^(k+1) w_k vᵀ Jᵏ v / k, the mean over probes, `(*)`: an estimate of log det(I + J).

    Unbiased for log det(I + J) = Σ_k (-1)^(k+1) tr(Jᵏ) / k if E vvᵀ = I (Hutchinson 1990) and w_k is the inverse of the
    probability that the k-th term is taken (Russian roulette). Differentiable to any order; all terms keep their graphs.

    Args:
        product: V -> J V, as `Linearizable.linearize` returns it.
        v: probes, `(S, *, event)`.
        weights: w_1, w_2, ...: see `roulette_weights`.
        event_dim: number of event dimensions.
    """
    return _value(_powers(product, v, len(weights)), weights, event_dim)


def neumann_log_det(
    product: Product, v: Tensor, weights: Sequence[float], event_dim: int = 1
) -> Tensor:
    """Returns the value of `log_det_series`, with an unbiased gradient that needs the graph of one product only.

    The gradient is that of tr((I + J)⁻¹ dJ) = Σ_k (-1)ᵏ tr(dJ Jᵏ), k >= 0, estimated with the same probes and weights:
    u = Σ_k (-1)ᵏ w_(k+1) Jᵏ v without a graph, then vᵀ dJ u. It equals the gradient of the value in the mean, not for
    one v, and has no derivative: second ones need `log_det_series`.

    Args:
        product, v, weights, event_dim: as in `log_det_series`.

    References:
        Chen, Behrmann, Duvenaud & Jacobsen 2019, Residual Flows for Invertible Generative Modeling, section 3.2.
    """
    with torch.no_grad():
        powers = _powers(product, v, len(weights))
        value = _value(powers, weights, event_dim).detach()
        u = _sum([(-1) ** k * w * p for k, (w, p) in enumerate(zip(weights, powers, strict=False))])
    # Each element of the batch carries a graph of its own: whatever arrives from above, one weight a row as in
    # importance-weighted bounds, multiplies the gradient of that row. A backward pass computed ahead and summed over the
    # batch could only be multiplied by one number.
    surrogate = _dot(v, product(u.detach()), event_dim)
    return value + (surrogate - surrogate.detach())


def roulette_weights(
    num_terms: int, num_exact_terms: int, continue_prob: float
) -> tuple[float, ...]:
    """Returns the weights of a power series under Russian roulette.

    Args:
        num_terms: number of terms taken.
        num_exact_terms: number of leading terms, which are always taken.
        continue_prob: p; the k-th term after those is reached with probability pᵏ.

    Returns:
        1 for the leading terms, and p⁻ᵏ for the k-th one after them.

    Example:
        >>> roulette_weights(4, 2, 0.5)
        (1.0, 1.0, 2.0, 4.0)
    """
    return tuple(continue_prob ** -max(0, k - num_exact_terms) for k in range(1, num_terms + 1))


def _powers(product: Product, v: Tensor, num_terms: int) -> list[Tensor]:
    """v, J v, ..., J^n v."""
    powers = [v]
    for _ in range(num_terms):
        powers.append(product(powers[-1]))
    return powers


def _value(powers: Sequence[Tensor], weights: Sequence[float], event_dim: int) -> Tensor:
    terms = enumerate(zip(weights, powers[1:], strict=True), 1)
    return _sum([(-1) ** (k + 1) * w / k * _dot(powers[0], p, event_dim) for k, (w, p) in terms])


def _dot(v: Tensor, p: Tensor, event_dim: int) -> Tensor:
    """vᵀp, the mean over probes: `(S, *, event)` -> `(*)`."""
    return (v * p).flatten(p.dim() - event_dim).sum(-1).mean(0)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
