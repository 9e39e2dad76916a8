"""Conditional flows by name, for amortized guides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..transforms import (
    ComposeFlow,
    ElementwiseAffine,
    FlowTransform,
    HouseholderSylvester,
    Planar,
    iaf,
    realnvp,
)
from ._indexed import IndexedFlow, IndexedLayer
from .indexed import STEPS

# (dimension of the latents, dimension of the context) -> a transform; of "cif", its layers.
ConditionalFactory = Callable[[int, int], FlowTransform]

# How many layers a named flow has unless told otherwise.
NUM_LAYERS = {"planar": 8, "sylvester": 4, "iaf": 2, "realnvp": 4, "cif": 2}


def conditional_flow(
    flow: str | ConditionalFactory | None,
    num_layers: int | None,
    hidden_dims: Sequence[int] | None,
) -> ConditionalFactory | None:
    """The factory of a flow from (D, H): the one of that name, or the callable as it is."""
    if flow is None or not isinstance(flow, str):
        if flow is not None and not callable(flow):
            raise TypeError(
                f"flow: expected a name, None or a callable from (D, H) to a transform, got {flow!r}"
            )
        if num_layers is not None or hidden_dims is not None:
            raise ValueError("num_layers and hidden_dims go with a flow by name")
        return flow
    if flow not in NUM_LAYERS:
        raise ValueError(f"flow: expected one of {', '.join(NUM_LAYERS)}, or None; got {flow!r}")
    if num_layers is None:
        num_layers = NUM_LAYERS[flow]
    return partial(_flow, flow, num_layers, hidden_dims)


def placed(flow: Any, affine: ElementwiseAffine) -> ComposeFlow | IndexedFlow:
    """A flow, or None for no flow, with an affine map behind it."""
    if isinstance(flow, nn.ModuleList):  # of indexed layers
        return IndexedFlow(list(flow), affine)  # type: ignore[arg-type]
    return ComposeFlow([affine] if flow is None else [flow, affine])


def _flow(
    name: str, num_layers: int, hidden_dims: Sequence[int] | None, dim: int, context_dim: int
) -> Any:
    if name in ("iaf", "realnvp"):
        make = {"iaf": iaf, "realnvp": realnvp}[name]
        return make(dim, num_layers=num_layers, hidden_dims=hidden_dims, context_dim=context_dim)
    if name == "cif":
        widths = (64, 64) if hidden_dims is None else tuple(hidden_dims)
        # Steps that draw in one pass, and have several modes where affine ones are poor at those.
        steps = STEPS["nsf-ar"](
            dim, num_layers=num_layers, hidden_dims=hidden_dims, context_dim=context_dim
        )
        return nn.ModuleList(
            IndexedLayer(f, dim, hidden_dims=widths, context_dim=context_dim) for f in steps
        )
    hidden_dims = () if hidden_dims is None else hidden_dims  # linear in the features
    if name == "planar":
        return Planar(dim, num_layers=num_layers, context_dim=context_dim, hidden_dims=hidden_dims)
    # Of the three kinds the one whose Q is smooth in the features: Gram-Schmidt's jumps where a matrix turns singular, as
    # those of a curve of data do, and its gradient is infinite there.
    return HouseholderSylvester(
        dim, num_layers=num_layers, context_dim=context_dim, hidden_dims=hidden_dims
    )
