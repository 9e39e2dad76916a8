"""The same architectures built in several libraries, for side-by-side timings: `build(architecture, dim)`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as stock
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

from pyro_flows_ext.transforms import maf, nsf, realnvp

# Two hidden layers of 128 and 8 bins on [-5, 5] everywhere, as zuko has it.
HIDDEN, BINS, BOUND = 128, 8, 5.0
ARCHITECTURES = {"realnvp": 8, "maf": 5, "nsf": 3, "nsf-ar": 3}  # name -> layers
LIBRARIES = ("pyro", "zuko", "nflows", "normflows")


@dataclass
class Flow:
    """A density and its parameters, whoever made it."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int], Tensor]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def missing() -> list[str]:
    """The libraries that are not installed, and are left out."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def build(architecture: str, dim: int) -> dict[str, Callable[[], Flow]]:
    """Library -> constructor of `architecture`, one of `ARCHITECTURES`; "ours" comes first."""
    makers = {
        "ours": _ours,
        "pyro": _pyro,
        "zuko": _zuko,
        "nflows": _nflows,
        "normflows": _normflows,
    }
    for name in missing():
        del makers[name]
    return {name: lambda make=make: make(architecture, dim) for name, make in makers.items()}


def _in_pyro(dim: int, transforms: list) -> Flow:
    base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
    flow = dist.TransformedDistribution(base, transforms)
    modules = nn.ModuleList(t for t in transforms if isinstance(t, nn.Module))
    return Flow(modules, flow.log_prob, lambda n: flow.sample((n,)))


def _ours(architecture: str, dim: int) -> Flow:
    options: dict = {
        "num_layers": ARCHITECTURES[architecture],
        "hidden_dims": (HIDDEN, HIDDEN),
        "activation": nn.ReLU,
    }
    if architecture in ("maf", "nsf-ar"):
        options["residual"] = False
    if architecture.startswith("nsf"):
        kind = "autoregressive" if architecture == "nsf-ar" else "coupling"
        flow = nsf(dim, kind=kind, linear=False, num_bins=BINS, bound=BOUND, **options)
    else:
        flow = {"realnvp": realnvp, "maf": maf}[architecture](dim, **options)
    return _in_pyro(dim, [flow])


def _pyro(architecture: str, dim: int) -> Flow:
    hidden = [HIDDEN, HIDDEN]
    # Pyro's classes draw fast forwards; `.inv` of them is no module, so the density's parameters are kept apart.
    layers: list = []
    modules = nn.ModuleList()
    for _ in range(ARCHITECTURES[architecture]):
        if architecture == "realnvp":
            layer = stock.affine_coupling(dim, hidden)
        elif architecture == "nsf":
            layer = stock.spline_coupling(dim, hidden_dims=hidden, count_bins=BINS, bound=BOUND)
        elif architecture == "maf":
            layer = stock.affine_autoregressive(dim, hidden)
        else:
            # Its helper builds a network for linear splines whatever the order.
            net = AutoRegressiveNN(dim, hidden, param_dims=[BINS, BINS, BINS - 1])
            spline = {"count_bins": BINS, "bound": BOUND, "order": "quadratic"}
            layer = stock.SplineAutoregressive(dim, net, **spline)
        modules.append(layer)
        is_density = architecture in ("maf", "nsf-ar")
        layers += [
            layer.inv if is_density else layer,
            stock.permute(dim, torch.arange(dim).flip(0)),
        ]
    flow = _in_pyro(dim, layers)
    return Flow(modules, flow.log_prob, flow.sample)


def _zuko(architecture: str, dim: int) -> Flow:
    import zuko

    options: dict = {"hidden_features": (HIDDEN, HIDDEN)}
    layers = ARCHITECTURES[architecture]
    if (
        architecture == "nsf"
    ):  # its NSF is autoregressive, and a network of D outputs where it couples
        layer = zuko.flows.coupling.GeneralCouplingTransform
        options |= {
            "univariate": zuko.transforms.MonotonicRQSTransform,
            "shapes": [(BINS,), (BINS,), (BINS - 1,)],
        }
        half = torch.arange(dim) < dim // 2
        transforms = [layer(dim, mask=half ^ (k % 2 == 1), **options) for k in range(layers)]
        base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, torch.zeros(dim), torch.ones(dim), buffer=True
        )
        flow = zuko.lazy.Flow(transforms, base)
    elif architecture == "nsf-ar":
        flow = zuko.flows.NSF(dim, bins=BINS, transforms=layers, **options)
    else:
        make = {"realnvp": zuko.flows.RealNVP, "maf": zuko.flows.MAF}[architecture]
        flow = make(dim, transforms=layers, **options)
    return Flow(flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,)))


def _nflows(architecture: str, dim: int) -> Flow:
    from nflows import transforms as T
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NFlow

    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    made = {"hidden_features": HIDDEN, "num_blocks": 1, "use_residual_blocks": False}
    layers: list[nn.Module] = []
    for k in range(ARCHITECTURES[architecture]):
        mask = (torch.arange(dim) < dim // 2) ^ (k % 2 == 1)
        if architecture == "realnvp":
            layers.append(T.AffineCouplingTransform(mask, _Net))
        elif architecture == "nsf":
            layers.append(T.PiecewiseRationalQuadraticCouplingTransform(mask, _Net, **spline))
        elif architecture == "maf":
            layers += [
                T.MaskedAffineAutoregressiveTransform(dim, **made),
                T.ReversePermutation(dim),
            ]
        else:
            layers += [
                T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(dim, **made, **spline),
                T.ReversePermutation(dim),
            ]
    flow = NFlow(T.CompositeTransform(layers), StandardNormal([dim]))
    return Flow(flow, flow.log_prob, flow.sample)


def _normflows(architecture: str, dim: int) -> Flow:
    import normflows as nf
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    half, reverse = dim // 2, nf.flows.Permute(dim, mode="swap")
    made = {"num_blocks": 1, "use_residual_blocks": False}
    layers: list[nn.Module] = []
    for k in range(ARCHITECTURES[architecture]):
        if architecture == "realnvp":
            net = nf.nets.MLP([half, HIDDEN, HIDDEN, dim])
            layers += [nf.flows.AffineCouplingBlock(net), reverse]
        elif architecture == "maf":
            layer = nf.flows.MaskedAffineAutoregressive(dim, HIDDEN, **made)
            layers += [_FlipDirection(layer), reverse]
        elif architecture == "nsf":
            mask = (torch.arange(dim) < half) ^ (k % 2 == 1)
            layers.append(
                _FlipDirection(
                    PiecewiseRationalQuadraticCoupling(
                        mask,
                        _Net,
                        num_bins=BINS,
                        tails="linear",
                        tail_bound=BOUND,
                    )
                )
            )
        else:
            layer = nf.flows.AutoregressiveRationalQuadraticSpline(
                dim, 1, HIDDEN, num_bins=BINS, tail_bound=BOUND
            )
            layers += [layer, reverse]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), layers)
    return Flow(flow, flow.log_prob, lambda n: flow.sample(n)[0])


class _Net(nn.Sequential):
    """Two hidden layers, for libraries that hand their networks a context, if only None."""

    def __init__(self, inputs: int, outputs: int):
        first, second = nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(HIDDEN, outputs))

    def forward(self, x: Tensor, context: None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class _FlipDirection(nn.Module):
    """A layer that runs from the data to the base, as normflows's own wrappers of such layers turn it round."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z, ladj = self.layer.inverse(z)
        return z, ladj.view(-1)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        z, ladj = self.layer(z)
        return z, ladj.view(-1)
