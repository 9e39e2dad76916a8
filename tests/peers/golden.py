"""What the comparisons with other libraries share: one map as two libraries write it, and how their parameters translate.

The other libraries bound scales and slopes in ways of their own. Where they do, the test translates *parameters*, so that
both sides compute the same map, and compares values and log-dets. All but Pyro are optional: the tests of a library that
is not installed are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_flows_ext.nn import MADE, MLP
from pyro_flows_ext.transforms import FlowTransform, Transformer

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]

ROWS = 40
TOLERANCE = 1e-9  # both sides compute in float64, and end within 1e-12 as a rule


@dataclass(frozen=True)
class Pair:
    """One map by two libraries: `ours`, and the passes of theirs in the same orientation, where it has them."""

    ours: FlowTransform
    forward: Pass | None = None
    inverse: Pass | None = None
    event_shape: tuple[int, ...] = (4,)


def compare(pair: Pair) -> None:
    """Both passes at points of their own."""
    assert pair.forward or pair.inverse
    shape = pair.event_shape
    for ours, theirs, event in (
        (pair.ours.forward_and_ladj, pair.forward, shape),
        (pair.ours.inverse_and_ladj, pair.inverse, pair.ours.forward_shape(shape)),
    ):
        if theirs is not None:
            x = 2 * torch.randn(ROWS, *event, dtype=torch.float64)
            compare_at(x, ours, theirs(x.clone()))


def compare_at(x: Tensor, ours: Pass, theirs: tuple[Tensor, Tensor]) -> None:
    """Our pass over x against the value and the log-det `(ROWS)` of theirs."""
    y, ladj = theirs
    assert (y - x.reshape(y.shape)).abs().max() > 0.1, "two identities agree whatever they are"
    torch.testing.assert_close(ours(x), (y, ladj), rtol=TOLERANCE, atol=TOLERANCE)


# --- their passes ---


def of_transform(transform: Transform, event_dim: int = 1) -> dict[str, Pass]:
    """The passes of a transform of torch or Pyro, whose log-dets may be by element."""

    def by_row(x: Tensor, y: Tensor) -> Tensor:
        ladj = transform.log_abs_det_jacobian(x, y)
        extra = event_dim - transform.domain.event_dim  # type: ignore[attr-defined]
        return ladj.expand(x.shape).sum(tuple(range(-extra, 0))) if extra else ladj

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = transform(x)
        return y, by_row(x, y)

    def inverse(y: Tensor) -> tuple[Tensor, Tensor]:
        x = transform.inv(y)
        return x, -by_row(x, y)

    return {"forward": forward, "inverse": inverse}


def of_module(module: Any, *, inverted: bool = False) -> dict[str, Pass]:
    """The passes of a module of nflows or normflows, `module(x)` and `module.inverse(x)`."""
    there, back = module.forward, module.inverse
    return {"forward": back, "inverse": there} if inverted else {"forward": there, "inverse": back}


# --- their parameters ---


def softplus_inverse(y: Tensor) -> Tensor:
    return y + (-torch.expm1(-y)).log()


def celu_inverse(y: Tensor) -> Tensor:
    """Of the map that keeps our slopes minus one above -0.999: s for s >= 0, 0.999 (exp(s / 0.999) - 1) below."""
    return torch.where(y >= 0, y, 0.999 * torch.log1p(y.clamp_max(0) / 0.999))


def raw_of_log_scale(log_scale: Tensor) -> Tensor:
    """Our log-scales are c tanh(raw / c) with c = log 1000."""
    c = math.log(1000)
    return c * (log_scale / c).atanh()


def raw_of_knots(widths: Tensor, heights: Tensor, slopes: Tensor, dim: int = -1) -> Tensor:
    """Our spline parameters for parts of the box by bin, `(*, K)` twice, and slopes at inner knots, `(*, K - 1)`.

    Ours are 0.001 + (1 - 0.001 K) softmax(raw / 2) and 0.001 + softplus(raw + shift), with the shift for which 0 gives 1.
    """
    least = 1e-3
    parts = (torch.cat([widths, heights], dim) - least) / (1 - least * widths.shape[dim])
    shift = math.log(math.expm1(1 - least))
    return torch.cat([2 * parts.log(), softplus_inverse(slopes - least) - shift], dim)


def raw_of_durkan(theta: Tensor, divisor: float = 1.0) -> Tensor:
    """Our spline parameters `(*, 3K - 1, N)` for those of Durkan et al.'s code, whose widths and heights are divided first."""
    K = (theta.shape[-2] + 1) // 3
    sizes, slopes = theta.split([2 * K, K - 1], -2)
    widths, heights = (
        1e-3 + (1 - 1e-3 * K) * (part / divisor).softmax(-2) for part in sizes.split(K, -2)
    )
    return raw_of_knots(widths, heights, 1e-3 + F.softplus(slopes), -2)


class ReadAs(Transformer):
    """A transformer whose parameters a network emits as another library does: `convert` makes ours `(*, P, N)` of them."""

    def __init__(self, transformer: Transformer, convert: Callable[[Tensor], Tensor]):
        self.transformer, self.convert = transformer, convert
        self.num_params = transformer.num_params

    def forward(self, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self.transformer.forward(x, self.convert(theta))

    def inverse(self, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return self.transformer.inverse(y, self.convert(theta))


def affine(to_log_scale: Callable[[Tensor], Tensor], *, scale_first: bool = False) -> Callable:
    """For `ReadAs`: a shift and a scale, whose logarithm is `to_log_scale` of what the network emits."""

    def convert(theta: Tensor) -> Tensor:
        shift, scale = theta.flip(-2).unbind(-2) if scale_first else theta.unbind(-2)
        return torch.stack([shift, raw_of_log_scale(to_log_scale(scale))], -2)

    return convert


# --- their networks ---


class ParametersFirst(nn.Module):
    """A network that emits all parameters of the first variable, then all of the second, in our order."""

    def __init__(self, net: nn.Module, num_params: int):
        super().__init__()
        self.net, self.num_params = net, num_params

    def forward(self, x: Tensor) -> Tensor:
        return by_parameter(self.net(x), self.num_params, 1)


def by_parameter(tensor: Tensor, num_params: int, dim: int) -> Tensor:
    """Entries along `dim`, ordered by variable and then by parameter, in the order of the parameters."""
    parts = tensor.unflatten(dim, (-1, num_params))
    return parts.transpose(dim, dim + 1).flatten(dim, dim + 1)


def copy_mlp(ours: MLP, theirs: Sequence[tuple[Tensor, Tensor]], num_params: int) -> None:
    """Weights and biases by layer, the last one's by variable."""
    *hidden, last = theirs
    last = tuple(by_parameter(tensor, num_params, 0) for tensor in last)
    layers = [layer for layer in ours if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, [*hidden, last], strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


def copy_made(
    ours: MADE,
    theirs: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    by_variable: bool = True,
    context_weight: Tensor | None = None,
    masks_too: bool = False,
) -> None:
    """Weights, biases and masks by layer of a masked network of theirs, without residual connections.

    Hidden units are sorted by how many variables they see, which is the order of ours. Our own masks stay, and are a part
    of what is compared, unless `masks_too`, for networks that spread the degrees another way.
    """
    units = torch.arange(theirs[0][0].shape[1])
    seen = torch.eye(len(units), dtype=torch.float64)
    with torch.no_grad():
        for k, (layer, (weight, bias, mask)) in enumerate(zip(ours.layers, theirs, strict=True)):
            seen = ((mask.double() @ seen) > 0).double()  # which variables each unit sees
            if layer is not ours.layers[-1]:
                order = seen.sum(1).argsort(stable=True)
            else:
                order = torch.arange(len(seen))
                order = by_parameter(order, ours.num_params, 0) if by_variable else order
            layer.weight.copy_(weight[order][:, units])
            layer.bias.copy_(bias[order])
            if masks_too:
                layer.mask.copy_(mask[order][:, units])
            if k == 0 and context_weight is not None:
                ours.context_layer.weight.copy_(context_weight[order])
            units = order
