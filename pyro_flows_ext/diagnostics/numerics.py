"""How invertible is a flow in practice? Condition numbers, Lipschitz constants, and what a round trip loses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..transforms import FlowTransform


class LipschitzEstimate(NamedTuple):
    """Lipschitz constants of f and of f⁻¹, as far as the points looked at show them: see `lipschitz_estimate`."""

    forward: float
    inverse: float


def jacobian_condition_number(transform: FlowTransform, x: Tensor) -> Tensor:
    """κ = σ_max / σ_min of the Jacobian Df(x), by row: `(*, event)` -> `(*)`, at least 1.

    How many times longer f draws an error in one direction than in another; the inverse has the same κ at f(x). Exact,
    from the whole Jacobian: D reverse-mode passes for all rows together, D² numbers and O(D³) a row, with D the number
    of elements of an event: an image counts as one vector. κ beyond the inverse of machine epsilon (8e6 in float32,
    5e15 in float64) is rounding, and `inf` where σ_min rounds to zero: use float64 for such flows. NaN where the
    Jacobian is not finite.

    A transform bound to a batch of contexts is taken at each of them: x is broadcast to its `batch_shape`. In eval mode
    whatever mode the transform is in, which is left as it was. Raises `TypeError` for what is no `FlowTransform`
    (conditional ones without their context too), `ValueError` where the output has another number of elements.

    Source: Koehler, Mehta & Risteski 2021, Representational aspects of depth and conditioning in normalizing flows.
    """
    singular = _singular_values(transform, x)
    return singular[..., 0] / singular[..., -1]


def lipschitz_estimate(transform: FlowTransform, x: Tensor) -> LipschitzEstimate:
    """max σ_max(Df) and max 1 / σ_min(Df) over the rows of x `(*, event)`: local Lipschitz constants of f and of f⁻¹.

    Lower bounds of the global ones, which are suprema over all points; an upper bound takes knowledge of the family,
    e.g. `ResidualFlow.lipschitz`. Draw x where the flow is used, from its base: f⁻¹ is looked at in f(x). Where f
    carries a normal onto pieces apart from each other, one of the two grows without bound as the fit improves, and a
    round trip loses digits with it: see `round_trip_error`. Cost, modes and errors as in `jacobian_condition_number`, and
    `ValueError` for no rows. NaN where a Jacobian is not finite.

    Source: Cornish, Caterini, Deligiannidis & Doucet 2020, Relaxing Bijectivity Constraints with Continuously Indexed
    Normalising Flows; Behrmann, Vicol, Wang, Grosse & Jacobsen 2021, Understanding and Mitigating Exploding Inverses
    in Invertible Neural Networks.
    """
    singular = _singular_values(transform, x)
    if singular.numel() == 0:
        raise ValueError(f"x: expected at least one row, got shape {tuple(x.shape)}")
    largest, smallest = singular[..., 0].max(), singular[..., -1].min()  # NaN if any is
    return LipschitzEstimate(largest.item(), smallest.reciprocal().item())


def round_trip_error(transform: FlowTransform, x: Tensor) -> Tensor:
    """max_i |f⁻¹(f(x)) - x|_i by row: `(*, event)` -> `(*)`, in the units of x.

    The other order, |f(f⁻¹(y)) - y| at data y, is `round_trip_error(transform.inv, y)`. They differ: this one loses the
    digits that f squeezes out, that one those that f⁻¹ does. `inf` where the way there or back is not finite.
    Measured in the dtype of x: give float32 what shall be used in float32. Contexts, modes and errors as in
    `jacobian_condition_number`. Cost: a pass in each direction.

    Source: Behrmann et al. 2021 (see `lipschitz_estimate`), whose exploding inverses show as large errors.
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
