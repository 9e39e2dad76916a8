"""Flows of zuko at drawn parameters, with what they give: `python zuko_values.py OUT` writes tensors by name to OUT.

A script, to be run in a process of its own: importing zuko switches the validation of all distributions off.
"""

from __future__ import annotations

import sys

import torch
import zuko
from torch import Tensor, nn
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.transforms import LULinearTransform, MonotonicRQSTransform, PermutationTransform

ROWS, D, BINS = 40, 4, 5
HIDDEN = (12, 12)
NETS = {"hidden_features": HIDDEN, "activation": nn.Tanh}


def values(transform: torch.distributions.Transform) -> dict[str, Tensor]:
    """Both passes, each at points of its own."""
    x, y = 2 * torch.randn(2, ROWS, D)
    forward, ladj = transform.call_and_ladj(x)
    inverse = transform.inv(y)
    inverse_ladj = -transform.log_abs_det_jacobian(inverse, y)
    return {
        "x": x,
        "forward": forward,
        "forward ladj": ladj.sum(-1) if ladj.dim() == 2 else ladj,
        "y": y,
        "inverse": inverse,
        "inverse ladj": inverse_ladj.sum(-1) if inverse_ladj.dim() == 2 else inverse_ladj,
    }


def layers(net: nn.Module) -> list[dict[str, Tensor]]:
    """Weights, biases and, where there are any, masks."""
    return [
        {name: tensor.detach() for name, tensor in layer.state_dict().items()}
        for layer in net
        if hasattr(layer, "weight")
    ]


def of_flow(flow: zuko.flows.Flow, context: Tensor | None = None) -> dict[str, object]:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    parts = [
        {
            "layers": layers(part.hyper),
            "order": getattr(part, "order", torch.empty(0)),
            "mask": getattr(part, "mask", torch.empty(0)),
        }
        for part in flow.transform.transforms
    ]
    found = values(flow.transform(context))
    return {
        "parts": parts,
        "context": torch.empty(0) if context is None else context,
        "log_prob": flow(context).log_prob(found["x"]),
        **found,
    }


def nsf_c() -> zuko.flows.Flow:
    """Couplings of splines."""
    flow = zuko.flows.RealNVP(D, transforms=2, **NETS)
    options = {
        "univariate": MonotonicRQSTransform,
        "shapes": [(BINS,), (BINS,), (BINS - 1,)],
        **NETS,
    }
    flow.transform.transforms = nn.ModuleList(
        [GeneralCouplingTransform(D, mask=torch.arange(D) % 2 == i, **options) for i in (0, 1)]
    )
    return flow


def main(path: str) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    theta = 1.5 * torch.randn(ROWS, D, 3 * BINS - 1)
    spline = MonotonicRQSTransform(*theta.split([BINS, BINS, BINS - 1], -1), bound=3.0)
    lu = torch.diagonal_scatter(torch.randn(D, D), 0.5 + torch.rand(D))
    permutation = torch.tensor([2, 0, 3, 1])
    results = {
        "spline": {"theta": theta, **values(spline)},
        "lu_linear": {"lu": lu, **values(LULinearTransform(lu))},
        "permute": {"permutation": permutation, **values(PermutationTransform(permutation))},
        "maf": of_flow(zuko.flows.MAF(D, transforms=3, **NETS)),
        "maf_in_a_context": of_flow(
            zuko.flows.MAF(D, context=2, transforms=2, **NETS), torch.randn(ROWS, 2)
        ),
        "nsf": of_flow(zuko.flows.NSF(D, bins=BINS, transforms=2, **NETS)),
        "realnvp": of_flow(zuko.flows.RealNVP(D, transforms=3, **NETS)),
        "nsf_c": of_flow(nsf_c()),
    }
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
