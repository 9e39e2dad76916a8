"""Every density of the package, once in each form: what the tests of their contract run over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from entries import CONTEXT_DIM
from torch import nn

import pyro_flows_ext.distributions as D
import pyro_flows_ext.transforms as T

SMALL = (6,)
LOG_1000 = math.log(1000)


@dataclass(frozen=True)
class DensityEntry:
    """`make()` is the density. `scale`: of the perturbation. `reference(density, x)`: log p(x) of one with a bound."""

    make: Callable[[], D.Density]
    context_dim: int | None = None
    scale: float = 0.7
    reference: Callable | None = None

    @property
    def options(self) -> dict:
        """The keywords of the checks."""
        return {
            "context_dim": self.context_dim,
            "scale": self.scale,
            "reference": self.reference,
        }


def normal(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))


def mixture() -> dist.TorchDistribution:
    components = dist.Normal(torch.tensor([[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]]), 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.3, 0.2])), components)


class LearnedNormal(nn.Module):
    """A base that learns."""

    def __init__(self, dim: int):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class NormalByContext(nn.Module):
    """A base that learns how it depends on a context."""

    takes_context = True

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Linear(CONTEXT_DIM, dim)

    def forward(self, context: torch.Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.net(context), 1.0).to_event(1)


def image_flow() -> D.FlowDistribution:
    """Of images of one channel and 4 x 4 pixels, from noise of four channels and 2 x 2."""
    return D.FlowDistribution(
        normal(4, 2, 2),
        [T.affine_coupling((4, 2, 2), (4,)), T.Invertible1x1Conv(4), T.Squeeze(2).inv],
    )


def indexed(transforms: object, dim: int = 2, **options: object) -> D.ContinuouslyIndexedFlow:
    return D.ContinuouslyIndexedFlow(normal(dim), transforms, 1, (5,), (6,), **options)


def indexed_images(**options: object) -> D.ContinuouslyIndexedFlow:
    """Of images of one channel and 4 x 4 pixels, from noise of four channels and 2 x 2."""
    takes = {key: value for key, value in options.items() if key == "context_dim"}
    parts = [
        T.affine_coupling((4, 2, 2), (4,), **takes),
        T.ComposeFlow([T.Invertible1x1Conv(4), T.Squeeze(2).inv]),
        T.ResidualFlow((1, 4, 4), (3,), exact_log_det=True).inv,
    ]
    return D.ContinuouslyIndexedFlow(normal(4, 2, 2), parts, 2, (5,), (6,), **options)


def by_quadrature(flow: D.ContinuouslyIndexedFlow, x: torch.Tensor) -> torch.Tensor:
    """log p(x) of one layer with u of one dimension, by the trapezoid rule over u: `(*, D)` -> `(*)`."""
    (layer,) = flow.layers
    u = torch.linspace(-30, 30, 1501, dtype=x.dtype).unsqueeze(-1)
    z, ladj = layer.indexed.condition(u).inverse_and_ladj(x.unsqueeze(-2))
    loc, raw = layer.index_net(z).chunk(2, -1)
    scale = (LOG_1000 * (raw / LOG_1000).tanh()).exp()  # the bound on all scales
    log_joint = dist.Normal(loc, scale).log_prob(u).squeeze(-1) + flow.base.log_prob(z) + ladj
    return log_joint.logsumexp(-1) + torch.log(u[1, 0] - u[0, 0])


class Counted(T.ElementwiseAffine):
    """Writes down its passes."""

    def __init__(self, dim):
        super().__init__(dim)
        self.passes = []

    def forward_and_ladj(self, x):
        self.passes.append("forward")
        return super().forward_and_ladj(x)

    def inverse_and_ladj(self, y):
        self.passes.append("inverse")
        return super().inverse_and_ladj(y)


def level(shape: tuple[int, int, int]) -> T.FlowTransform:
    """One level of a multi-scale flow."""
    return T.affine_coupling(shape, (4,))


def flow_vae() -> D.FlowVAE:
    return D.FlowVAE(T.affine_coupling(2, SMALL), 2, 1, hidden_dims=SMALL)


def standardized(density: D.Density) -> D.Density:
    """With data in units of their own."""
    density.standardize(torch.tensor([1.0, -0.5]), torch.tensor([2.0, 0.5]))
    return density


def vae_by_quadrature(flow: D.FlowVAE, x: torch.Tensor) -> torch.Tensor:
    """log p(x) by the trapezoid rule over ε of one dimension: `(*, D)` -> `(*)`."""
    noise = torch.linspace(-10, 10, 2001, dtype=x.dtype).unsqueeze(-1)
    z, ladj = flow.transform.inverse_and_ladj(x)
    loc, raw = flow.decoder(noise).chunk(2, -1)
    scale = (LOG_1000 * (raw / LOG_1000).tanh()).exp()
    log_z = dist.Normal(loc, scale).to_event(1).log_prob(z.unsqueeze(-2))
    log_noise = dist.Normal(0.0, 1.0).log_prob(noise).squeeze(-1)
    return (log_z + log_noise).logsumexp(-1) + torch.log(noise[1, 0] - noise[0, 0]) + ladj


DENSITIES = {
    "angles": DensityEntry(
        lambda: D.FlowDistribution(
            D.UniformAngles(2), T.circular_nsf(2, num_layers=2, hidden_dims=SMALL, num_bins=4)
        )
    ),
    "flow-planar": DensityEntry(lambda: D.FlowDistribution(normal(2), T.planar(2))),
    "flow-sylvester": DensityEntry(lambda: D.FlowDistribution(normal(3), T.sylvester(3))),
    "flow-maf": DensityEntry(
        lambda: D.FlowDistribution(normal(2), T.maf(2, num_layers=2, hidden_dims=SMALL))
    ),
    "flow-iaf": DensityEntry(
        lambda: D.FlowDistribution(normal(2), T.iaf(2, num_layers=2, hidden_dims=SMALL))
    ),
    "flow-nsf": DensityEntry(
        lambda: D.FlowDistribution(
            normal(2), T.nsf(2, num_layers=2, hidden_dims=SMALL, num_bins=4)
        ),
        scale=0.4,
    ),
    "flow-one-dimension": DensityEntry(
        lambda: D.FlowDistribution(dist.StudentT(5.0, torch.zeros(1), torch.ones(1)), T.planar(1))
    ),
    "flow-mixture-base": DensityEntry(
        lambda: D.FlowDistribution(mixture(), T.affine_coupling(2, SMALL))
    ),
    "flow-batched-base": DensityEntry(
        lambda: D.FlowDistribution(
            dist.MultivariateNormal(torch.arange(6.0).reshape(3, 2), torch.eye(2)), T.radial(2)
        )
    ),
    "flow-learned-base": DensityEntry(lambda: D.FlowDistribution(LearnedNormal(2), T.sylvester(2))),
    "flow-standardized": DensityEntry(
        lambda: standardized(D.FlowDistribution(normal(2), T.affine_coupling(2, SMALL)))
    ),
    "flow-image": DensityEntry(image_flow, scale=0.3),
    "conditional-flow": DensityEntry(
        lambda: D.FlowDistribution(
            normal(2),
            [
                T.conditional_planar(2, CONTEXT_DIM, SMALL),
                T.LULinear(2),
                T.conditional_affine_coupling(2, CONTEXT_DIM, SMALL),
            ],
        ),
        context_dim=CONTEXT_DIM,
    ),
    "conditional-flow-and-base": DensityEntry(
        lambda: D.FlowDistribution(
            NormalByContext(2), T.spline_coupling(2, SMALL, num_bins=4, context_dim=CONTEXT_DIM)
        ),
        context_dim=CONTEXT_DIM,
    ),
    "indexed-maf": DensityEntry(
        lambda: indexed(T.affine_autoregressive(2, SMALL)), scale=0.4, reference=by_quadrature
    ),
    "indexed-realnvp": DensityEntry(
        lambda: indexed(T.realnvp(2, num_layers=2, hidden_dims=SMALL)), scale=0.3
    ),
    "indexed-nsf": DensityEntry(
        lambda: indexed(T.spline_coupling(2, SMALL, num_bins=4)), scale=0.4, reference=by_quadrature
    ),
    "indexed-context": DensityEntry(
        lambda: indexed(
            T.affine_coupling(2, SMALL, context_dim=CONTEXT_DIM), context_dim=CONTEXT_DIM
        ),
        context_dim=CONTEXT_DIM,
        scale=0.2,
    ),
    "indexed-images": DensityEntry(indexed_images, scale=0.3),
    "indexed-images-by-vector": DensityEntry(lambda: indexed_images(index_image=False), scale=0.3),
    "indexed-images-context": DensityEntry(
        lambda: indexed_images(context_dim=CONTEXT_DIM), context_dim=CONTEXT_DIM, scale=0.3
    ),
    "nested-dropout": DensityEntry(
        lambda: D.NestedDropoutFlow(normal(2), [T.affine_coupling(2, SMALL), T.LULinear(2)])
    ),
    "multi-scale": DensityEntry(lambda: D.MultiScaleFlow((2, 4, 4), level, 2), scale=0.3),
    "flow-vae": DensityEntry(flow_vae, scale=0.3, reference=vae_by_quadrature),
}
