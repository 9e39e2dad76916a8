"""The numerical invertibility of a flow: condition numbers, Lipschitz constants, and errors of a round trip."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..transforms import FlowTransform


class LipschitzEstimate(NamedTuple):
    """Lower bounds on the Lipschitz constants of f and of f⁻¹: see `lipschitz_estimate`."""

    forward: float
    inverse: float


def jacobian_condition_number(transform: FlowTransform, x: Tensor) -> Tensor:
    """κ = σ_max / σ_min of the Jacobian Df(x), by row, at least 1.

    κ is the ratio of the largest to the smallest stretch of an error; the inverse has the same κ at f(x). Exact, from
    the whole Jacobian: D reverse-mode passes for all rows together, D² numbers and O(D³) a row, D the number of
    elements of an event. Beyond the inverse of machine epsilon (8e6 in float32, 5e15 in float64) κ is rounding error:
    use float64 for such flows. The transform is evaluated in eval mode; its own mode is restored.

    Args:
        transform: a flow; if bound to a batch of contexts, x is broadcast to its `batch_shape`.
        x: `(*, event)`.

    Returns:
        `(*)`; `inf` if σ_min rounds to zero, NaN if the Jacobian is not finite.

    Raises:
        TypeError: for other objects than a `FlowTransform`, and for one that lacks its context.
        ValueError: if the output has another number of elements.

    References:
        Koehler, Mehta & Risteski 2021, Representational aspects of depth and conditioning in normalizing flows.
    """
    singular = _singular_values(transform, x)
    return singular[..., 0] / singular[..., -1]


def lipschitz_estimate(transform: FlowTransform, x: Tensor) -> LipschitzEstimate:
    """Lower bound: max σ_max(Df) and max 1 / σ_min(Df) over the rows of x, local Lipschitz constants of f and of f⁻¹.

    The global constants are suprema over all points; an upper bound needs the family, e.g. `ResidualFlow.lipschitz`.
    For f from a normal distribution to separate parts, one of the two grows without bound as the fit improves, and a
    round trip loses digits: see `round_trip_error`. Cost and modes as in `jacobian_condition_number`.

    Args:
        transform: a flow.
        x: `(*, event)`, e.g. draws of its base; f⁻¹ is evaluated at f(x).

    Returns:
        The two numbers; NaN if a Jacobian is not finite.

    Raises:
        TypeError, ValueError: as in `jacobian_condition_number`; and for no rows.

    References:
        Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
        Normalising Flows; Behrmann, Vicol, Wang, Grosse & Jacobsen 2021, Understanding and Mitigating Exploding
        Inverses in Invertible Neural Networks.
    """
    singular = _singular_values(transform, x)
    if singular.numel() == 0:
        raise ValueError(f"x: expected at least one row, got shape {tuple(x.shape)}")
    largest, smallest = singular[..., 0].max(), singular[..., -1].min()  # NaN if any is
    return LipschitzEstimate(largest.item(), smallest.reciprocal().item())


def round_trip_error(transform: FlowTransform, x: Tensor) -> Tensor:
    """max_i |f⁻¹(f(x)) - x|_i by row, in the units and the dtype of x.

    The other order, |f(f⁻¹(y)) - y| at data y, is `round_trip_error(transform.inv, y)`. The two differ: the first loses
    the digits that f contracts, the second those that f⁻¹ contracts. Cost: a pass in each direction.

    Args:
        transform: a flow.
        x: `(*, event)`.

    Returns:
        `(*)`; `inf` if either pass is not finite.

    Raises:
        TypeError, ValueError: as in `jacobian_condition_number`.

    References:
        Behrmann et al. 2021 (see `lipschitz_estimate`), whose exploding inverses appear as large errors.
    """
    x = _rows(transform, x)
    with _eval_mode(transform), torch.no_grad():
        back = transform.inverse_and_ladj(transform.forward_and_ladj(x)[0])[0]
    error = (back - x).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return error.flatten(x.dim() - transform.domain.event_dim).amax(-1)


def _singular_values(transform: FlowTransform, x: Tensor) -> Tensor:
    """The singular values of Df(x) by row, falling: `(*, event)` -> `(*, D)`; NaN where Df is not finite."""
    jacobian = _jacobian(transform, x)
    D, E = jacobian.shape[-2:]
    if D != E:
        raise ValueError(
            f"transform: expected as many elements in an output as in an input, got {D} for {E}; "
            "only a square Jacobian has an inverse"
        )
    is_finite = jacobian.isfinite().all(-1).all(-1)[..., None]
    # LAPACK refuses a batch in which one matrix is not finite.
    singular = torch.linalg.svdvals(jacobian.where(is_finite[..., None], 0.0))
    return singular.where(is_finite, math.nan)


def _jacobian(transform: FlowTransform, x: Tensor) -> Tensor:
    """Df(x) by row, flattened: `(*, event)` -> `(*, D, D)`, without a graph.

    Rows are independent, so that ∂ Σ_rows f_i / ∂x holds ∂f_i / ∂x for each of them: one vmap over the outputs i
    serves all rows, and parameters bound to a batch need no vmap of their own.
    """
    x = _rows(transform, x)
    cut, event_dim = x.dim() - transform.domain.event_dim, transform.codomain.event_dim

    def total(x: Tensor) -> Tensor:
        y = transform.forward_and_ladj(x)[0]
        return y.flatten(0, cut - 1).sum(0).flatten() if y.dim() > event_dim else y.flatten()

    with _eval_mode(transform), torch.no_grad():
        jacobian = torch.func.jacrev(total)(x)  # (D, *, event)
    return jacobian.flatten(cut + 1).movedim(0, -2)


def _rows(transform: FlowTransform, x: Tensor) -> Tensor:
    """x without its graph, expanded to the transform's batch; checks both."""
    if not isinstance(transform, FlowTransform):
        hint = "; condition(context) gives one" if hasattr(transform, "condition") else ""
        raise TypeError(
            f"transform: expected a FlowTransform, got a {type(transform).__name__}{hint}"
        )
    shape = transform.forward_shape(x.shape)
    batch = shape[: len(shape) - transform.codomain.event_dim]
    return x.detach().expand(batch + x.shape[x.dim() - transform.domain.event_dim :])


@contextlib.contextmanager
def _eval_mode(transform: nn.Module) -> Iterator[None]:
    """Eval mode: in training mode a pass may mix rows (BatchNorm) or set parameters (ActNorm)."""
    modes = {module: module.training for module in transform.modules()}
    transform.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
